"""From a split's pictures to what a step or an evaluation takes: samples, loaders, and the work left to the device."""

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.batches import Batch, Parcel, Position, Unreadable
from resnext_hub.data.dataset import Pictures, StreamedPictures
from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.data.loaders import (
    PICTURE_MODES,
    EvaluationSamples,
    StepSampler,
    TrainingSamples,
    build_train_loader,
)
from resnext_hub.data.stream import StreamBatches, StreamedEvaluation, build_stream_loader
from resnext_hub.data.transforms import build_eval_transform, draw_mix, erase, mix_pairs, normalize
from resnext_hub.errors import RequestError
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.schedule import size_at

MOST_TRIED = 1000
"""Images that are tried before a run starts, where the first ones cannot be read."""


def evaluation_samples(
    pictures: Pictures | StreamedPictures, data_config: dict[str, Any], max_pixels: int = MAX_IMAGE_PIXELS
) -> EvaluationSamples | StreamedEvaluation:
    """Return the samples of an evaluation split as timm's evaluation transform makes them."""
    transform, mode = build_eval_transform(data_config), PICTURE_MODES[data_config["input_size"][0]]
    if isinstance(pictures, StreamedPictures):
        return StreamedEvaluation(pictures, transform, mode, max_pixels)
    return EvaluationSamples(pictures, transform, mode, max_pixels)


def require_readable(samples: EvaluationSamples | StreamedEvaluation) -> None:
    """Refuse an evaluation split of which nothing can be read, before anything is computed.

    A stream is not asked, as it would be fetched for that; nor is all of a large split.

    Raises:
        RequestError: If it is so.
    """
    if isinstance(samples, StreamedEvaluation):
        return
    unread: list[Unreadable] = []
    for index in range(len(samples)):
        unreadable = samples[index].unreadable
        if not unreadable or len(unread) == MOST_TRIED:
            return
        unread += unreadable
    first = f", the first: {printable(unread[0].name)} ({unread[0].reason})" if unread else ""
    raise RequestError(
        f"none of the {len(samples)} images to evaluate on can be read{first}; mend them, or name another --eval-split"
    )


def training_loader(
    config: TrainConfig,
    pictures: Pictures | StreamedPictures,
    data_config: dict[str, Any],
    *,
    start: int,
    stop: int,
    position: Position,
    process: int,
    processes: int,
    pin_memory: bool,
) -> DataLoader[Parcel]:
    """Give one process's part of every step from `start` to before `stop`.

    Args:
        config: The resolved configuration.
        pictures: The training split.
        data_config: Input size, interpolation, mean and std, in timm's keys.
        start: The first step, counted from 0.
        stop: Steps of the run.
        position: Where a stream stands; of other data it follows from the step.
        process: Number of this process.
        processes: How many there are.
        pin_memory: Whether batches lie where a GPU can fetch them.
    """
    workers = config.loader.workers or 0
    augment = Augmentation(config.transform, data_config, config.loader.decoder, config.loader.max_image_pixels)
    if isinstance(pictures, StreamedPictures):
        batches = StreamBatches(
            pictures,
            augment,
            seed=config.seed,
            batch_size=config.batch_size,
            block_size=config.data.shuffle_block,
            start=position,
            steps=stop - start,
            process=process,
            processes=processes,
        )
        return build_stream_loader(batches, workers, pin_memory)
    samples = TrainingSamples(pictures, augment, config.seed)
    sampler = StepSampler(len(pictures), config.batch_size, config.seed, start, stop, process, processes)
    return build_train_loader(samples, sampler, workers, pin_memory)


class StepInputs:
    """What is left to the device: normalising, erasing, mixing, and the size of the pictures at a step.

    Args:
        config: The resolved configuration.
        data_config: Input size, mean and std, in timm's keys.
        classes: Number of classes.
        steps: Steps of the run.
        device: The device of this process.
        process: Number of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        data_config: dict[str, Any],
        *,
        classes: int,
        steps: int,
        device: torch.device,
        process: int,
    ) -> None:
        self.config, self.classes, self.steps, self.device, self.process = config, classes, steps, device, process
        self.mean, self.std = (
            torch.tensor(data_config[name], device=device).view(-1, 1, 1) for name in ("mean", "std")
        )
        self.size: int = data_config["input_size"][-1]

    def __call__(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give pictures `(N, C, H, W)` and labels `(N,)`, or mixed targets `(N, classes)`, on the device."""
        transform = self.config.transform
        labels = batch.labels.to(self.device, non_blocking=True)
        images = normalize(batch.images.to(self.device, non_blocking=True), self.mean, self.std)
        if transform.random_erasing:
            images = erase(images, batch.erased)
        if transform.mixes:
            first = self.process * len(labels) // 2
            pairs = range(first, first + len(labels) // 2)
            mix = draw_mix(transform, self.config.seed, step, pairs, (images.shape[2], images.shape[3]))
            images, labels = mix_pairs(images, labels, mix, self.classes)
        size = size_at(step, self.steps, self.config.progressive_size, self.size)
        if size != self.size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last), labels
