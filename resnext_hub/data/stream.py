"""The order of samples that are read in order, and the loaders that follow it.

An epoch is the shards in an order drawn from (seed, epoch), cut into blocks of consecutive samples, each block shuffled
within itself by (seed, epoch, block). The run is one endless sequence of epochs, of which step s takes the next
global batch: the same samples at any number of processes and readers, and each once per epoch. Every reader reads the
stream as a whole and decodes what is its own.

The state is a `Position`. Going on from one reads, but does not decode, what lies before it in its epoch.
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
    """A place of the sequence: a sample within its block, and where the sequence stands after it."""

    block: list[Record]
    within: int
    epoch: int
    after: Position


class StreamBatches(IterableDataset[Parcel]):
    """This process's part of each step, augmented: a contiguous part of the global batch.

    Args:
        images: The stream.
        augment: Maps a stored image to an augmented one.
        seed: Seed of order and augmentation.
        batch_size: Samples of a global batch.
        block_size: Consecutive samples that are shuffled among themselves.
        start: Where the first step begins.
        steps: How many steps there are.
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
        reader = get_worker_info()
        number, readers = (0, 1) if reader is None else (reader.id, reader.num_workers)
        pack = Packer()
        part = self.batch_size // self.processes
        places = self._places(speaks=self.process == 0 and number == 0)
        for step in range(self.steps):
            taken = [next(places) for _ in range(self.batch_size)]
            if step % readers == number:
                mine = taken[self.process * part : (self.process + 1) * part]
                yield pack([self._sample(place) for place in mine], end=taken[-1].after)

    def _places(self, speaks: bool) -> Iterator[_Place]:
        epoch, done = self.start
        while True:
            begin, read = time.monotonic(), 0
            for number, (block, last) in enumerate(self._blocks(epoch)):
                first = done - read
                read += len(block)
                if read <= done:
                    continue
                if speaks and done and first >= 0:
                    seconds = time.monotonic() - begin
                    _logger.info("passed over %d records of epoch %d, undecoded, in %.1f s", done, epoch, seconds)
                order = np.random.default_rng((self.seed, epoch, number)).permutation(len(block))
                for place in range(max(first, 0), len(block)):
                    ended = last and place == len(block) - 1
                    after = Position(epoch + 1, 0) if ended else Position(epoch, read - len(block) + place + 1)
                    yield _Place(block, int(order[place]), epoch, after)
            if read == 0:
                raise RunError("the training split holds no records")
            epoch, done = epoch + 1, 0

    def _blocks(self, epoch: int) -> Iterator[tuple[list[Record], bool]]:
        """Give the blocks of an epoch in order, and whether each is its last."""
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
        """Decode and augment; a sample that cannot be read is replaced by the next of its block that can."""
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
            f"none of {len(place.block)} consecutive records can be read; the last: {printable(unreadable[-1].name)} "
            f"({unreadable[-1].reason})"
        )


class StreamedEvaluation:
    """Samples after the evaluation transform, in the order of the shards.

    One that cannot be read is black, and listed as unreadable.
    """

    def __init__(
        self, images: StreamedImages, transform: Transform, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.images, self.transform, self.mode, self.max_pixels = images, transform, mode, max_pixels
        self.count = 0
        """Number of samples, once they were read to the end."""

    def batches(
        self, batch_size: int, process: int, processes: int, workers: int, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Give every so many-th batch, one of which a process computes whole."""
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
    """The batches of one process, and at the end of each reader the number of all samples."""

    def __init__(self, samples: StreamedEvaluation, batch_size: int, process: int, processes: int) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Parcel | int]:
        reader = get_worker_info()
        pack = Packer()
        number, readers = (0, 1) if reader is None else (reader.id, reader.num_workers)
        images = self.samples.images
        count = 0
        batch: list[Sample] = []
        for count, record in enumerate(images.read(range(images.shards)), start=1):
            turn = (count - 1) // self.batch_size
            if turn % self.processes == self.process and turn // self.processes % readers == number:
                batch.append(self.samples.sample(count - 1, record))
            if batch and count % self.batch_size == 0:
                yield pack(batch)
                batch = []
        if batch:
            yield pack(batch)
        yield count


def build_stream_loader(batches: StreamBatches, workers: int, pin_memory: bool = False) -> DataLoader[Parcel]:
    """Give one batch of this process for each step; every reader takes its turn."""
    return build_loader(batches, None, workers, pin_memory)
