"""Sample order and data loaders of streams.

An epoch consists of the shards in an order drawn from (seed, epoch), split into blocks of consecutive samples that are
each shuffled by (seed, epoch, block). A run is one endless sequence of epochs, and every step takes the next global
batch: the same samples for any number of processes and workers, each once per epoch. Every worker reads the whole
stream, but decodes only its own samples.

The state is a `Position`. Resuming from one reads the samples before it in its epoch without decoding them.
"""

import logging
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from resnext_hub.data.augment import Augment
from resnext_hub.data.batches import Batch, Packer, Parcel, Position, Sample, Unreadable, build_loader, read_items
from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError
from resnext_hub.data.images import Record, StreamedImages
from resnext_hub.data.loaders import read_transformed, seed_sample
from resnext_hub.data.transforms import Transform
from resnext_hub.errors import RunError
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


class _Place(NamedTuple):
    """A place of the sequence: a sample within its block, and the position after it."""

    block: list[Record]
    within: int
    epoch: int
    after: Position


class StreamBatches(IterableDataset[Parcel]):
    """The augmented samples of each step for one process: a contiguous part of the global batch.

    Args:
        images: The stream.
        augment: Maps an encoded image to an augmented one.
        seed: Seed of order and augmentation.
        batch_size: Samples of a global batch.
        block_size: Consecutive samples that are shuffled among themselves.
        start: Position before the first step.
        steps: Number of steps.
        process: Index of this process.
        processes: Number of processes.
    """

    def __init__(
        self,
        images: StreamedImages,
        augment: Augment,
        *,
        seed: int,
        batch_size: int,
        block_size: int,
        start: Position,
        steps: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        self.batch_size, self.block_size = batch_size, block_size
        self.start, self.steps = start, steps
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Parcel]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        pack = Packer()
        part = self.batch_size // self.processes
        places = self._places(logs=self.process == 0 and number == 0)
        for step in range(self.steps):
            taken = [next(places) for _ in range(self.batch_size)]
            if step % workers == number:
                mine = taken[self.process * part : (self.process + 1) * part]
                yield pack([self._sample(place) for place in mine], end=taken[-1].after)

    def _places(self, logs: bool) -> Iterator[_Place]:
        epoch, done = self.start
        while True:
            begin, read = time.monotonic(), 0
            for number, (block, last) in enumerate(self._blocks(epoch)):
                first = done - read
                read += len(block)
                if read <= done:
                    continue
                if logs and done and first >= 0:
                    seconds = time.monotonic() - begin
                    _logger.info("skipped %d records of epoch %d without decoding, in %.1f s", done, epoch, seconds)
                order = np.random.default_rng((self.seed, epoch, number)).permutation(len(block))
                for place in range(max(first, 0), len(block)):
                    ended = last and place == len(block) - 1
                    after = Position(epoch + 1, 0) if ended else Position(epoch, read - len(block) + place + 1)
                    yield _Place(block, int(order[place]), epoch, after)
            if read == 0:
                raise RunError("the training split has no records")
            epoch, done = epoch + 1, 0

    def _blocks(self, epoch: int) -> Iterator[tuple[list[Record], bool]]:
        """Yield the blocks of an epoch in order, and whether each is the last one."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(self.images.shards)
        block: list[Record] = []
        for record in self.images.read([int(shard) for shard in shards]):
            if len(block) == self.block_size:
                yield block, False
                block = []
            block.append(record)
        if block:
            yield block, True

    def _sample(self, place: _Place) -> Sample:
        """Decode and augment a sample; an unreadable one is replaced by the next readable one of its block."""
        own = place.block[place.within]
        unreadable = []
        for offset in range(len(place.block)):
            record = place.block[(place.within + offset) % len(place.block)]
            seed_sample(self.seed, place.epoch, own.key)
            try:
                image, erased = self.augment(self.images.row(record))
            except UnreadableImageError as error:
                unreadable.append(Unreadable(record.key, record.name, str(error)))
                continue
            return Sample(image, record.label, own.key, unreadable, erased)
        raise RunError(
            f"{len(place.block)} consecutive records are unreadable; the last one: {printable(unreadable[-1].name)} "
            f"({unreadable[-1].reason})"
        )


class StreamedEvaluation:
    """Samples after the evaluation transform, in the order of the shards.

    An unreadable one is black and listed as unreadable.
    """

    def __init__(
        self, images: StreamedImages, transform: Transform, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.images, self.transform, self.mode, self.max_pixels = images, transform, mode, max_pixels
        self.count = 0
        """Number of samples, known after reading them to the end."""

    def batches(
        self, batch_size: int, process: int, processes: int, workers: int, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Yield every `processes`-th batch of `batch_size` samples, starting with the one numbered `process`."""
        parts = _EvaluationParts(self, batch_size, process, processes)
        for item in read_items(build_loader(parts, None, workers, pin_memory)):
            if isinstance(item, int):
                self.count = item
            else:
                yield item.open()

    def sample(self, index: int, record: Record) -> Sample:
        """Decode and transform a sample."""
        unreadable = []
        try:
            image = read_transformed(self.images.row(record), self.transform, self.mode, self.max_pixels)
        except UnreadableImageError as error:
            unreadable = [Unreadable(index, record.name, str(error))]
            image = self.transform(Image.new(self.mode, (8, 8)))
        return Sample(image, record.label, index, unreadable)


class _EvaluationParts(IterableDataset[Parcel | int]):
    """The batches of one process, and at the end of each worker the total number of samples."""

    def __init__(self, samples: StreamedEvaluation, batch_size: int, process: int, processes: int) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Parcel | int]:
        worker = get_worker_info()
        pack = Packer()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        images = self.samples.images
        count = 0
        batch: list[Sample] = []
        for count, record in enumerate(images.read(range(images.shards)), start=1):
            turn = (count - 1) // self.batch_size
            if turn % self.processes == self.process and turn // self.processes % workers == number:
                batch.append(self.samples.sample(count - 1, record))
            if batch and count % self.batch_size == 0:
                yield pack(batch)
                batch = []
        if batch:
            yield pack(batch)
        yield count


def build_stream_loader(batches: StreamBatches, workers: int, pin_memory: bool = False) -> DataLoader[Parcel]:
    """Return a loader that yields this process's batch of each step; the workers take turns."""
    return build_loader(batches, None, workers, pin_memory)
