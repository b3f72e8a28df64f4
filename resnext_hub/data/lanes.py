"""The order of a stream: lanes that are read side by side, each by a single worker.

The row groups of all shards, in an order drawn from (seed, epoch), are one sequence of E samples, which is cut into L
lanes. A lane is divided into blocks of whole row groups, and each block is shuffled by (seed, epoch, lane, block). A
global batch takes B/L consecutive samples of each lane, in the order of the lanes, whoever reads them.

In epoch e, lane l has floor(((e+1)E + l) / L) - floor((eE + l) / L) samples. They add up to E (Hermite's identity), and
after any number of epochs no two lanes differ by more than one sample. So they stay in step, every place of a run
follows from its step by arithmetic, and a resume opens the row group of its place.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MOST_LANES = 64
"""Default number of lanes of a large stream; more allow more workers, but hold more row groups in memory."""

FEWEST_LANES = 4
"""Default number of lanes of a small stream, if the batch size allows it."""

GROUPS_PER_LANE = 50
"""Row groups that a lane should have: the one at each cut is read twice, and a resume reads one of each lane again."""

GROUPS_PER_READER = 10
"""Row groups that a worker should have in an evaluation, in which there is nothing to resume."""

_PROCESSES = range(1, 17)
"""Numbers of processes that should divide the lanes."""


class Piece(NamedTuple):
    """Consecutive rows of a shard."""

    shard: int
    first: int
    last: int
    """Row after the last one."""


class Block(NamedTuple):
    """Samples of a lane that are shuffled among themselves, as far as they belong to a range of its places."""

    epoch: int
    pieces: tuple[Piece, ...]
    order: np.ndarray
    """Indices into the rows of the pieces, shuffled."""
    begin: int
    """First place in `order` that belongs to the range."""
    end: int


class Share(NamedTuple):
    """A part of each global batch: some of the samples that a lane contributes to it."""

    lane: int
    first: int
    last: int
    """Sample after the last one, counted from the first one of the lane's contribution."""


class _Sequence:
    """Row groups in some order, as one sequence of rows.

    Args:
        groups: Rows of each row group of each shard.
        order: The order of the row groups, as indices; that of the shards if not given.
    """

    def __init__(self, groups: Sequence[np.ndarray], order: np.ndarray | slice = slice(None)) -> None:
        self._shards = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])[order]
        self._firsts = np.concatenate([np.cumsum(rows) - rows for rows in groups])[order]
        self._ends = np.cumsum(np.concatenate(groups)[order])

    def ends(self, low: int, high: int) -> list[int]:
        """Return where the row groups in a range end, the last one being cut at the end of the range."""
        first, last = np.searchsorted(self._ends, low, "right"), np.searchsorted(self._ends, high, "left")
        found: list[int] = np.minimum(self._ends[first : last + 1], high).tolist()
        return found if low < high else []

    def pieces(self, low: int, high: int) -> list[Piece]:
        """Return the rows in a range."""
        pieces: list[Piece] = []
        group = int(np.searchsorted(self._ends, low, "right"))
        while low < high:
            end = min(int(self._ends[group]), high)
            first = int(self._firsts[group]) + low - (int(self._ends[group - 1]) if group else 0)
            shard, last = int(self._shards[group]), first + end - low
            if pieces and (pieces[-1].shard, pieces[-1].last) == (shard, first):
                pieces[-1] = pieces[-1]._replace(last=last)
            elif last > first:
                pieces.append(Piece(shard, first, last))
            low, group = end, group + 1
        return pieces


def fitting_lanes(batch_size: int, groups: int) -> int:
    """Return the default number of lanes: one that divides the batch, and that many numbers of processes divide.

    Args:
        batch_size: Samples of a global batch.
        groups: Number of row groups of the stream.
    """
    most = min(MOST_LANES, max(groups // GROUPS_PER_LANE, FEWEST_LANES))
    fitting = [lanes for lanes in range(1, most + 1) if batch_size % lanes == 0]
    return max(fitting, key=lambda lanes: (sum(lanes % processes == 0 for processes in _PROCESSES), lanes))


def most_readers(groups: int) -> int:
    """Return how many workers may share the evaluation of a number of row groups; each may read one of another."""
    return max(groups // GROUPS_PER_READER, FEWEST_LANES)


class Lanes:
    """The samples of each lane.

    Args:
        groups: Rows of each row group of each shard.
        lanes: Number of lanes.
        seed: Random seed.
        block_size: Samples of all lanes together that are shuffled at a time, if they are at most a 50th of all: those
            of the block in use are read again by a resume.
    """

    def __init__(self, groups: Sequence[np.ndarray], *, lanes: int, seed: int, block_size: int) -> None:
        self.lanes, self.count = lanes, sum(int(rows.sum()) for rows in groups)
        self._groups, self._seed = groups, seed
        self._block_size = min(block_size, self.count // GROUPS_PER_LANE) // lanes
        self._sequences: dict[int, _Sequence] = {}

    def locate(self, lane: int, place: int) -> tuple[int, int]:
        """Return the epoch of a place of a lane, and the place within its part of that epoch."""
        epoch = ((place + 1) * self.lanes - lane - 1) // self.count
        return epoch, place - self._begin(epoch, lane)

    def part(self, epoch: int, lane: int) -> tuple[int, int]:
        """Return where a lane begins and ends in the sequence of an epoch."""
        first, last = (self._before(epoch + 1, n) - self._before(epoch, n) for n in (lane, lane + 1))
        return first, last

    def blocks(self, lane: int, first: int, last: int) -> Iterator[Block]:
        """Yield the blocks that contain the places of a lane from `first` up to `last`, which is not included."""
        while first < last:
            epoch, begin = self.locate(lane, first)
            start, stop = self.part(epoch, lane)
            ends = self._block_ends(epoch, start, stop)
            for number in range(bisect_right(ends, start + begin), len(ends)):
                low, high = ends[number - 1] if number else start, ends[number]
                end = min(high - low, begin + last - first - (low - start))
                order = np.random.default_rng((self._seed, epoch, lane, number)).permutation(high - low)
                yield Block(
                    epoch, tuple(self._sequence(epoch).pieces(low, high)), order, max(begin - (low - start), 0), end
                )
                if end < high - low:
                    return
            first += stop - start - begin

    def _begin(self, epoch: int, lane: int) -> int:
        """Return the number of samples of a lane before an epoch."""
        return (epoch * self.count + lane) // self.lanes

    def _before(self, epoch: int, lane: int) -> int:
        """Return the number of samples of all lanes before a lane, and before an epoch."""
        whole, rest = divmod(epoch * self.count, self.lanes)
        return lane * whole + max(0, lane - (self.lanes - rest))

    def _sequence(self, epoch: int) -> _Sequence:
        """Return the sequence of an epoch; the last two are kept, because lanes do not end at the same moment."""
        if epoch not in self._sequences:
            self._sequences = {old: kept for old, kept in self._sequences.items() if old == epoch - 1}
            order = np.random.default_rng((self._seed, epoch)).permutation(sum(map(len, self._groups)))
            self._sequences[epoch] = _Sequence(self._groups, order)
        return self._sequences[epoch]

    def _block_ends(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the ends of the blocks in a part of an epoch: as many row groups as fit, but at least one."""
        found, low, before = [], start, start
        for end in self._sequence(epoch).ends(start, stop):
            if end - low > self._block_size and before > low:
                found.append(before)
                low = before
            before = end
        return [*found, stop] if start < stop else []


def in_order(groups: Sequence[np.ndarray], first: int, last: int) -> Iterator[Piece]:
    """Yield the row groups that hold the rows from `first` up to `last` of a stream in the order of its shards.

    Args:
        groups: Rows of each row group of each shard.
        first: The first row.
        last: The row after the last one.
    """
    sequence = _Sequence(groups)
    for end in sequence.ends(first, last):
        yield from sequence.pieces(first, end)
        first = end


def divide(batch_size: int, lanes: int, process: int, processes: int, workers: int) -> list[list[Share]]:
    """Return what each data-loading worker of a process contributes to every global batch.

    A worker reads whole lanes, so there are at most as many workers as lanes. Only if the number of processes does not
    divide the number of lanes, two processes read the same lane, and each decodes a part of its samples.

    Args:
        batch_size: Samples of a global batch.
        lanes: Number of lanes.
        process: Index of this process.
        processes: Number of processes.
        workers: Number of data-loading workers; 0 reads in the process itself.
    """
    each, part = batch_size // lanes, batch_size // processes
    first, last = process * part, (process + 1) * part
    shares = [
        Share(lane, max(first - lane * each, 0), min(last - lane * each, each))
        for lane in range(first // each, -(-last // each))
    ]
    readers = max(1, min(workers, len(shares)))
    cuts = [len(shares) * reader // readers for reader in range(readers + 1)]
    return [shares[begin:end] for begin, end in pairwise(cuts)]
