"""Inputs of training steps and evaluations: samples, data loaders, and the preprocessing that runs on the device."""

from collections.abc import Generator

import torch
from torch.nn import functional as F

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.batches import Batch, Unreadable, read_batches
from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.data.images import IndexedImages, StreamedImages
from resnext_hub.data.loaders import EvaluationSamples, TrainingSamples, build_train_loader
from resnext_hub.data.order import Order, StepSampler
from resnext_hub.data.stream import StreamedEvaluation, StreamSamples
from resnext_hub.data.transforms import EvalTransform, draw_mix, erase, mix_pairs, normalize
from resnext_hub.errors import RequestError, setting
from resnext_hub.models.input_config import InputConfig
from resnext_hub.text import printable
from resnext_hub.training.plan import Plan
from resnext_hub.training.schedule import size_at

MAX_TRIED = 1000
"""Number of images to try before a run starts, if the first ones are unreadable."""


def evaluation_samples(
    images: IndexedImages | StreamedImages, input: InputConfig, max_pixels: int = MAX_IMAGE_PIXELS
) -> EvaluationSamples | StreamedEvaluation:
    """Return the samples of an evaluation split, with timm's evaluation transform."""
    transform = EvalTransform(input)
    if isinstance(images, StreamedImages):
        return StreamedEvaluation(images, transform, input.mode, max_pixels)
    return EvaluationSamples(images, transform, input.mode, max_pixels)


def require_readable(samples: EvaluationSamples | StreamedEvaluation, part: str = "evaluation") -> None:
    """Check that some image of a split is readable, before anything is computed.

    A stream is not checked, since that would download it; of a large split only the first images are tried.

    Args:
        samples: The samples of the split.
        part: `evaluation` or `test`, for the message.

    Raises:
        RequestError: If no image is readable.
    """
    if isinstance(samples, StreamedEvaluation):
        return
    unread: list[Unreadable] = []
    for index in range(len(samples)):
        unreadable = samples[index].unreadable
        if not unreadable or len(unread) == MAX_TRIED:
            return
        unread += unreadable
    first = f"; the first is {printable(unread[0].name)} ({unread[0].reason})" if unread else ""
    raise RequestError(
        f"none of the {len(samples)} images of the {part} split is readable{first}. Fix them, or choose another "
        f"{setting('eval_split' if part == 'evaluation' else 'test_split')}"
    )


def training_batches(
    plan: Plan, *, start: int, process: int, processes: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Return one process's part of every batch from step `start` to the end of the run; close it to end the workers.

    Args:
        plan: The run.
        start: The first step, counted from 0.
        process: Index of this process.
        processes: Number of processes.
        pin_memory: Whether to put batches into pinned memory, for faster transfer to a GPU.
    """
    config, images = plan.config, plan.splits.train
    workers, stop = config.loader.workers or 0, plan.schedule.steps
    augment = Augmentation(config.transform, plan.input, config.loader.decoder, config.loader.max_image_pixels)
    if isinstance(images, StreamedImages):
        assert config.data.lanes is not None
        stream = StreamSamples(
            images,
            augment,
            seed=config.seed,
            batch_size=config.batch_size,
            lanes=config.data.lanes,
            block_size=config.data.shuffle_block,
        )
        return stream.batches(start, stop, process, processes, workers, pin_memory)
    samples = TrainingSamples(images, augment, config.seed)
    labels = images.labels if config.balance.sampling == "balanced" else None
    repeats = config.repeated_augmentation
    order = Order(len(images), config.seed, labels, repeats, max(config.batch_size // repeats, 1))
    sampler = StepSampler(order, config.batch_size, start, stop, process, processes)
    return read_batches(build_train_loader(samples, sampler, workers, pin_memory))


class StepInputs:
    """The preprocessing of each step that runs on the device: normalization, random erasing, mixing and resizing.

    Args:
        plan: The run.
        device: The device of this process.
        process: Index of this process.
    """

    def __init__(self, plan: Plan, *, device: torch.device, process: int) -> None:
        self._config, self._schedule = plan.config, plan.schedule
        self._classes = len(plan.splits.label_names)
        self._device, self._process = device, process
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (plan.input.mean, plan.input.std)
        )
        self._size = plan.input.image_size

    def __call__(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images `(N, C, H, W)` and labels `(N,)`, or targets `(N, classes)`, on the device.

        Targets are for mixed images, and for images that can have several labels.
        """
        transform = self._config.transform
        labels = batch.labels.to(self._device, non_blocking=True)
        if labels.dtype == torch.bool:
            labels = labels.float()
        images = normalize(batch.images.to(self._device, non_blocking=True), self._mean, self._std)
        if transform.random_erasing:
            images = erase(images, batch.erased)
        if transform.mixes:
            first = self._process * len(labels) // 2
            pairs = range(first, first + len(labels) // 2)
            mix = draw_mix(transform, self._config.seed, step, pairs, (images.shape[2], images.shape[3]))
            images, labels = mix_pairs(images, labels, mix, self._classes)
        size = size_at(step, self._schedule.steps, self._config.progressive_size, self._size)
        if size != self._size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last), labels
