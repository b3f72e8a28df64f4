"""The order of the samples, and the loaders that follow it.

A run is one endless sequence of places: epoch after epoch, each a permutation drawn from (seed, epoch). Step s takes
the places s*B to (s+1)*B-1, so every global batch is full, crosses the end of an epoch where it must, and is the same
at any number of processes. Resuming is starting at another step.
"""

import random
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from resnext_hub.data.augment import NOTHING, Augment, Edges
from resnext_hub.data.dataset import Pictures
from resnext_hub.data.decode import UnreadablePictureError
from resnext_hub.data.transforms import Transform
from resnext_hub.errors import RequestError, RunError
from resnext_hub.machine import cores

PICTURE_MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of input channels."""

GRACE = 25
"""Seconds that a reading process outlives SIGTERM; launchers give the whole run 30."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How pictures are read."""

    workers: int | None = None
    """Reading processes beside each training process; derived from device and cores if not given."""
    decoder: Literal["auto", "simplejpeg", "pil"] = "auto"
    """What decodes JPEGs to train on: simplejpeg is fast, pil the reference; auto is a run's own one, else simplejpeg
    where it is installed."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise RequestError(f"--workers {self.workers} is negative")


class Place(NamedTuple):
    """One place of the endless sequence: which sample, in which epoch."""

    epoch: int
    sample: int


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be decoded."""

    index: int
    name: str
    """What people know it by."""
    reason: str


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture `(C, H, W)` with its label and index, and what could not be read on the way."""

    image: torch.Tensor
    label: int
    index: int
    unreadable: list[Unreadable]
    erased: Edges = NOTHING


class Position(NamedTuple):
    """Where the endless sequence of samples stands: in which epoch, and how many of its samples are done."""

    epoch: int
    place: int


class Batch(NamedTuple):
    """Pictures `(N, C, H, W)`, labels and indices `(N,)` int64, what was unreadable.

    Pictures to train on are uint8 and channels last in memory, `erased` `(N, 4)` int64 has the edges of what is to be
    erased of each; those to evaluate on are float32 and normalised. `end` is where the sequence stands after the global
    batch; None if that follows from the step.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: list[Unreadable]
    erased: torch.Tensor
    end: Position | None = None


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def places_of_step(step: int, batch_size: int, count: int, seed: int) -> list[Place]:
    """Give the places of one global batch, drawn from `count` samples."""
    places = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(place, count)
        places.append(Place(epoch, int(_permutation(seed, epoch, count)[offset])))
    return places


def seed_sample(seed: int, epoch: int, index: int, repeat: int = 0) -> None:
    """Seed all three generators that transforms draw from, as a function of what identifies the sample."""
    state = np.random.SeedSequence((seed, epoch, index, repeat)).generate_state(4)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(int(state[2]))
    torch.default_generator.manual_seed(int(state[3]))


class TrainingSamples(Dataset[Sample]):
    """Augmented samples by place. One that cannot be read is replaced by another, a function of its index alone."""

    def __init__(self, pictures: Pictures, augment: Augment, seed: int) -> None:
        self.pictures = pictures
        self.augment = augment
        self.seed = seed

    def __getitem__(self, place: Place) -> Sample:
        unreadable: list[Unreadable] = []
        index = place.sample
        while True:
            seed_sample(self.seed, place.epoch, place.sample)
            try:
                image, erased = self.augment(self.pictures.row(index))
                break
            except UnreadablePictureError as error:
                unreadable.append(Unreadable(index, self.pictures.name(index), str(error)))
                if len(unreadable) == 100:
                    raise RunError(f"100 pictures drawn after each other cannot be read; the last: {error}") from None
                draw = np.random.SeedSequence((place.sample, len(unreadable))).generate_state(1, np.uint64)[0]
                index = int(draw % len(self.pictures))
        return Sample(image, int(self.pictures.labels[index]), place.sample, unreadable, erased)


class EvaluationSamples(Dataset[Sample]):
    """Samples as the evaluation transform gives them. One that cannot be read is black, and said to be unreadable."""

    def __init__(self, pictures: Pictures, transform: Transform, mode: str = "RGB") -> None:
        self.pictures = pictures
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        unreadable = []
        try:
            image = self.pictures.image(index, self.mode)
        except UnreadablePictureError as error:
            unreadable = [Unreadable(index, self.pictures.name(index), str(error))]
            image = Image.new(self.mode, (8, 8))
        return Sample(self.transform(image), int(self.pictures.labels[index]), index, unreadable)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self)

    def batches(
        self, batch_size: int, process: int, processes: int, workers: int, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Give every so many-th batch, one of which a process computes whole."""
        cuts = [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]
        return read_batches(_build_loader(self, cuts[process::processes], workers, pin_memory))


class StepSampler(Sampler[list[Place]]):
    """This process's places of each step from `start` to `stop`: a contiguous part of the global batch."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.start, self.stop = start, stop
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[Place]]:
        part = self.batch_size // self.processes
        for step in range(self.start, self.stop):
            places = places_of_step(step, self.batch_size, self.count, self.seed)
            yield places[self.process * part : (self.process + 1) * part]


def build_train_loader(
    samples: TrainingSamples, sampler: StepSampler, workers: int, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Give one batch of this process for each step."""
    return _build_loader(samples, sampler, workers, pin_memory)


def _build_loader(dataset: Dataset, batches: object, workers: int, pin_memory: bool) -> DataLoader[Batch]:  # type: ignore[type-arg]
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_stopping_to_the_parent,
    )


def leave_stopping_to_the_parent(worker: int) -> None:
    """Read on when a signal reaches the whole process group: the training process ends its step, and its readers then.

    After `GRACE` seconds a reader goes in any case, so that nobody who wants it gone waits for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def read_batches(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """Give the batches of a loader; closing this generator ends the loader's workers."""
    try:
        yield from loader
    except RunError as error:  # from a worker it comes with that one's traceback in its text
        error.__traceback__ = None  # its frames hold the workers
        raise RunError(str(error).rpartition(f"{RunError.__name__}: ")[2].strip()) from None


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch, pixels in the order that they have in memory."""
    images = [sample.image for sample in samples]
    channels_last = images[0].dtype == torch.uint8
    return Batch(
        images=torch.stack([i.permute(1, 2, 0) for i in images]).permute(0, 3, 1, 2)
        if channels_last
        else torch.stack(images),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        unreadable=[entry for sample in samples for entry in sample.unreadable],
        erased=torch.tensor([sample.erased for sample in samples]),
    )


def derive_workers(device: str, local_processes: int) -> int:
    """Read in the training process where the CPU is busy computing anyway, else with up to 8 workers per process."""
    if device == "cpu":
        return 0
    return max(1, min(8, cores() // local_processes - 1))
