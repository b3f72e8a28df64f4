"""Samples and data loaders of streams; `lanes.py` defines their order.

A worker reads its lanes alone, one block of each at a time, while the next one is read in the background. Its parcels
are a part of each global batch; those of all workers of a process are joined to the batch of the process.
"""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count, islice
from typing import TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from resnext_hub.data.augment import Augment
from resnext_hub.data.batches import (
    Batch,
    Packer,
    Parcel,
    Sample,
    Unreadable,
    build_loader,
    join_parcels,
    read_batches,
    read_items,
)
from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError
from resnext_hub.data.images import Record, StreamedImages
from resnext_hub.data.lanes import Block, Lanes, Piece, Share, divide, in_order, most_readers
from resnext_hub.data.loaders import MOST_UNREADABLE, all_unreadable, is_mirrored, read_transformed, seed_sample
from resnext_hub.data.transforms import Transform

_THREADS = 8
"""Most threads of a worker that read in the background."""

Request = TypeVar("Request")


class StreamSamples:
    """Augmented samples of a stream, in the order of its lanes.

    Args:
        images: The stream.
        augment: Maps an encoded image to an augmented one.
        seed: Seed of order and augmentation.
        batch_size: Samples of a global batch.
        lanes: Number of lanes; it divides the batch size.
        block_size: Samples that are held in memory and shuffled, over all lanes.
    """

    def __init__(
        self, images: StreamedImages, augment: Augment, *, seed: int, batch_size: int, lanes: int, block_size: int
    ) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        self.batch_size = batch_size
        self.lanes = Lanes(images.groups, lanes=lanes, seed=seed, block_size=block_size)

    def batches(
        self, start: int, stop: int, process: int, processes: int, workers: int, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Yield the part of one process of every batch from step `start` up to `stop`, which is not included."""
        shares = divide(self.batch_size, self.lanes.lanes, process, processes, workers)
        parts = _TrainingParts(self, shares, range(start, stop))
        readers = len(shares) if workers else 0
        loader = build_loader(parts, None, readers, pin_memory and readers < 2)
        with closing(read_items(loader)) as parcels:
            while parts_of_step := list(islice(parcels, len(shares))):
                yield join_parcels(parts_of_step, pin_memory)

    def read(self, share: Share, steps: range, pool: ThreadPoolExecutor) -> Iterator[Sample]:
        """Return an iterator over the samples of a share of every step; its first block is read at once."""
        each = self.batch_size // self.lanes.lanes
        first, last = steps.start * each, steps.stop * each
        requests = ((block, block.pieces) for block in self.lanes.blocks(share.lane, first, last))
        blocks = _read_ahead(self.images, requests, pool)
        places = ((block, records, n) for block, records in blocks for n in range(block.begin, block.end))
        return (
            self._sample(block, records, within)
            for place, (block, records, within) in enumerate(places)
            if share.first <= place % each < share.last
        )

    def _sample(self, block: Block, records: list[Record], within: int) -> Sample:
        """Decode and augment a sample; an unreadable one is replaced, depending on its index and its block alone."""
        own = int(block.order[within])
        index = records[own].index
        unreadable: list[Unreadable] = []
        for record in islice(self._candidates(records, own), MOST_UNREADABLE):
            seed_sample(self.seed, block.epoch, index)
            try:
                image, erased = self.augment(self.images.row(record), is_mirrored(self.seed, block.epoch, index))
            except UnreadableImageError as error:
                unreadable.append(Unreadable(record.index, record.name, str(error)))
                continue
            return Sample(image, record.label, index, unreadable, erased)
        raise all_unreadable(unreadable[-1])

    def _candidates(self, records: list[Record], own: int) -> Iterator[Record]:
        """Yield a record, the next ones of its block, and then others, each of which has to be read."""
        yield from records[own:]
        yield from records[:own]
        for attempt in count():
            draw = np.random.SeedSequence((records[own].index, attempt)).generate_state(1, np.uint64)[0]
            index = int(draw % self.images.count)
            yield from self.images.records(index, index + 1)


class _TrainingParts(IterableDataset[Parcel]):
    """The shares of the workers of one process, step by step."""

    def __init__(self, samples: StreamSamples, shares: list[list[Share]], steps: range) -> None:
        self.samples, self.shares, self.steps = samples, shares, steps

    def __iter__(self) -> Iterator[Parcel]:
        worker = get_worker_info()
        mine = self.shares[worker.id if worker else 0]
        pack = Packer()
        with _reading_threads(len(mine)) as pool:
            streams = [(share, self.samples.read(share, self.steps, pool)) for share in mine]
            for _ in self.steps:
                yield pack([s for share, stream in streams for s in islice(stream, share.last - share.first)])


class StreamedEvaluation:
    """Samples after the evaluation transform, in the order of the shards.

    An unreadable one is black and listed as unreadable.
    """

    def __init__(
        self, images: StreamedImages, transform: Transform, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.images, self.transform, self.mode, self.max_pixels = images, transform, mode, max_pixels

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.images.count

    def batches(
        self, batch_size: int, process: int, processes: int, workers: int, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Yield the batches of `batch_size` samples that belong to a process: consecutive ones, read by it alone."""
        total = -(-self.count // batch_size)
        first, last = total * process // processes, total * (process + 1) // processes
        readers = min(workers, max(most_readers(self.images.row_groups) // processes, 1), max(last - first, 1))
        parts = _EvaluationParts(self, batch_size, range(first, last), max(readers, 1))
        return read_batches(build_loader(parts, None, readers, pin_memory))

    def sample(self, record: Record) -> Sample:
        """Decode and transform a sample."""
        unreadable = []
        try:
            image = read_transformed(self.images.row(record), self.transform, self.mode, self.max_pixels)
        except UnreadableImageError as error:
            unreadable = [Unreadable(record.index, record.name, str(error))]
            image = self.transform(Image.new(self.mode, (8, 8)))
        return Sample(image, record.label, record.index, unreadable)


class _EvaluationParts(IterableDataset[Parcel]):
    """The batches of one process; each worker reads a run of them."""

    def __init__(self, samples: StreamedEvaluation, batch_size: int, batches: range, readers: int) -> None:
        self.samples, self.batch_size, self.batches, self.readers = samples, batch_size, batches, readers

    def __iter__(self) -> Iterator[Parcel]:
        worker = get_worker_info()
        number, total = worker.id if worker else 0, len(self.batches)
        mine = self.batches[total * number // self.readers : total * (number + 1) // self.readers]
        first, last = mine.start * self.batch_size, min(mine.stop * self.batch_size, self.samples.count)
        pack = Packer()
        with _reading_threads(1) as pool:
            requests = ((None, [piece]) for piece in in_order(self.samples.images.groups, first, last))
            records = (r for _, some in _read_ahead(self.samples.images, requests, pool) for r in some)
            while batch := list(islice(records, self.batch_size)):
                yield pack([self.samples.sample(record) for record in batch])


@contextmanager
def _reading_threads(readers: int) -> Iterator[ThreadPoolExecutor]:
    """Open threads that read in the background; reads that are not needed any more are not waited for."""
    pool = ThreadPoolExecutor(min(readers, _THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read_ahead(
    images: StreamedImages, requests: Iterable[tuple[Request, Iterable[Piece]]], pool: ThreadPoolExecutor
) -> Iterator[tuple[Request, list[Record]]]:
    """Return an iterator over requests and their records; the next one is read while one is in use."""
    waiting = iter(requests)

    def submit() -> tuple[Request, Future[list[Record]]] | None:
        following = next(waiting, None)
        return None if following is None else (following[0], pool.submit(images.read, following[1]))

    def results(current: tuple[Request, Future[list[Record]]] | None) -> Iterator[tuple[Request, list[Record]]]:
        while current is not None:
            request, reading = current
            following = submit()
            yield request, reading.result()
            current = following

    return results(submit())
