"""Samples and data loaders of indexed datasets; `order.py` defines their order."""

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from resnext_hub.data.augment import Augment
from resnext_hub.data.batches import Batch, Parcel, Sample, Unreadable, build_loader, read_batches
from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, decode, within_memory
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.order import Place, StepSampler
from resnext_hub.data.transforms import Transform
from resnext_hub.errors import RunError
from resnext_hub.machine import cores
from resnext_hub.settings import FREE, FREE_PER_PROCESS, Range, check_fields
from resnext_hub.text import printable

WORKERS = 256
"""Most data-loading workers per training process."""

MOST_UNREADABLE = 100
"""Unreadable images in a row that end a run."""

PIXELS = 10_000_000_000
"""Greatest allowed `max_image_pixels`."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Data loading."""

    workers: Annotated[int, Range(0, WORKERS)] | None = field(default=None, metadata=FREE_PER_PROCESS)
    """Number of data-loading workers per training process, 0 to 256; if not given, it depends on the device and the
    number of CPU cores."""
    decoder: Literal["auto", "simplejpeg", "pil"] = field(default="auto", metadata=FREE)
    """JPEG decoder for training: simplejpeg is fast, pil is the reference; auto uses simplejpeg if it is installed, but
    a resumed run keeps its decoder."""
    max_image_pixels: Annotated[int, Range(1, PIXELS)] = field(default=MAX_IMAGE_PIXELS, metadata=FREE)
    """Treat images with more pixels than this (according to their header) as unreadable; decoding takes up to 10 bytes
    per pixel."""

    def __post_init__(self) -> None:
        check_fields(self)


def seed_sample(seed: int, epoch: int, index: int, repeat: int = 0) -> None:
    """Seed the three global generators that transforms draw from (random, NumPy, torch) for a sample."""
    state = np.random.SeedSequence((seed, epoch, index, repeat)).generate_state(4)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(int(state[2]))
    torch.default_generator.manual_seed(int(state[3]))


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Return whether an alternating flip mirrors a sample: a random half in even epochs, the others in odd ones."""
    first = np.random.SeedSequence((seed, index)).generate_state(1)[0]
    return bool((int(first) + epoch) % 2)


class TrainingSamples(Dataset[Sample]):
    """Augmented samples by place; an unreadable one is replaced by another, which depends only on its index."""

    def __init__(self, images: IndexedImages, augment: Augment, seed: int) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed

    def __getitem__(self, place: Place) -> Sample:
        unreadable: list[Unreadable] = []
        index = place.sample
        while True:
            seed_sample(self.seed, place.epoch, place.sample, place.repeat)
            mirrored = is_mirrored(self.seed, place.epoch + place.repeat, place.sample)
            try:
                image, erased = self.augment(self.images.row(index), mirrored)
                break
            except UnreadableImageError as error:
                unreadable.append(Unreadable(index, self.images.name(index), str(error)))
                if len(unreadable) == MOST_UNREADABLE:
                    raise all_unreadable(unreadable[-1]) from None
                draw = np.random.SeedSequence((place.sample, len(unreadable))).generate_state(1, np.uint64)[0]
                index = int(draw % len(self.images))
        return Sample(image, self.images.label(index), place.sample, unreadable, erased)


def all_unreadable(last: Unreadable) -> RunError:
    """Return the error for an image for which no replacement is readable, given the last one tried."""
    return RunError(
        f"{MOST_UNREADABLE} images in a row were unreadable; the last one was {printable(last.name)} ({last.reason})"
    )


def read_transformed(row: dict[str, Any], transform: Transform, mode: str, max_pixels: int) -> torch.Tensor:
    """Decode and transform an image.

    Raises:
        UnreadableImageError: If it cannot be decoded, or memory runs out.
    """
    with within_memory():
        return transform(decode(row, mode, max_pixels))


class EvaluationSamples(Dataset[Sample]):
    """Samples after the evaluation transform; an unreadable one is black and listed as unreadable."""

    def __init__(
        self, images: IndexedImages, transform: Transform, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.images = images
        self.transform = transform
        self.mode = mode
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        unreadable = []
        try:
            image = read_transformed(self.images.row(index), self.transform, self.mode, self.max_pixels)
        except UnreadableImageError as error:
            unreadable = [Unreadable(index, self.images.name(index), str(error))]
            image = self.transform(Image.new(self.mode, (8, 8)))
        return Sample(image, self.images.label(index), index, unreadable)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self)

    @property
    def labels(self) -> np.ndarray | None:
        """Which labels each sample has, `(N, classes)` bool; None if each has exactly one."""
        return self.images.labels if self.images.is_multi_label else None

    def batches(
        self, batch_size: int, process: int, processes: int, workers: int, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Yield every `processes`-th batch of `batch_size` samples, starting with the one numbered `process`."""
        cuts = [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]
        return read_batches(build_loader(self, cuts[process::processes], workers, pin_memory))


def build_train_loader(
    samples: TrainingSamples, sampler: StepSampler, workers: int, pin_memory: bool = False
) -> DataLoader[Parcel]:
    """Return a loader that yields this process's batch of each step."""
    return build_loader(samples, sampler, workers, pin_memory)


def derive_workers(device: str, local_processes: int) -> int:
    """Return the default number of workers per training process.

    It is 0 on a CPU, which is busy with training, else up to 8, depending on the cores.
    """
    if device == "cpu":
        return 0
    return max(1, min(8, cores() // local_processes - 1))
