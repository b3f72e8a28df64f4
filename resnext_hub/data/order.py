"""The order of the training samples of an indexed dataset.

A run is one endless sequence of places: epoch after epoch, each a function of the seed and the epoch's number. Step s
takes places s*B to (s+1)*B-1, so every global batch is full, crosses the end of an epoch if necessary, and is the
same for any number of processes. Resuming means starting at another step.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple, overload

import numpy as np
from torch.utils.data import Sampler

_BALANCED = 1
"""Distinguishes the random numbers of balanced epochs from those of plain ones."""


class Place(NamedTuple):
    """One place of the endless sequence: an epoch, a sample in it, and how often the epoch had it before."""

    epoch: int
    sample: int
    repeat: int = 0


_Span = tuple[int, np.ndarray, np.ndarray | None]
"""An epoch, samples in it, and how often it had each before, unless it has each once."""


class Places(Sequence[Place]):
    """Consecutive places of the endless sequence, as arrays.

    A worker receives them in a fraction of the time that a list of as many objects would take.

    Args:
        spans: The places in each epoch that they are in.
    """

    def __init__(self, spans: Sequence[_Span]) -> None:
        self._spans = tuple(spans)

    def __len__(self) -> int:
        return sum(len(samples) for _, samples, _ in self._spans)

    def __iter__(self) -> Iterator[Place]:
        for epoch, samples, repeats in self._spans:
            times = repeat(0) if repeats is None else repeats.tolist()
            yield from map(Place, repeat(epoch), samples.tolist(), times)

    @overload
    def __getitem__(self, place: int) -> Place: ...
    @overload
    def __getitem__(self, place: slice) -> list[Place]: ...
    def __getitem__(self, place: int | slice) -> Place | list[Place]:
        return list(self)[place]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # as for a list


class Order:
    """The samples of each epoch, which has as many places as there are samples.

    Args:
        count: Number of samples.
        seed: Random seed.
        labels: Labels of the samples, `(count,)`, for balanced epochs, in which all classes have equally many places:
            samples of small classes are repeated, and each epoch takes another part of the large ones. Without them,
            each sample has one place.
        repeats: How often each sample of an epoch occurs, for repeated augmentation; each epoch then takes another part
            of the samples.
        apart: Number of places from one occurrence of a sample to the next.
    """

    def __init__(
        self, count: int, seed: int, labels: np.ndarray | None = None, repeats: int = 1, apart: int = 1
    ) -> None:
        self.count, self._seed = count, seed
        self._repeats, self._apart = repeats, apart
        self._members = None if labels is None else by_class(labels)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}

    def step(self, step: int, batch_size: int, process: int = 0, processes: int = 1) -> "Places":
        """Return the places of one global batch, or only the contiguous part of one of several processes."""
        part = batch_size // processes
        place = step * batch_size + process * part
        end, spans = place + part, list[_Span]()
        while place < end:
            epoch, offset = divmod(place, self.count)
            samples, repeats = self._epoch(epoch)
            taken = slice(offset, offset + end - place)
            spans.append((epoch, samples[taken], None if repeats is None else repeats[taken]))
            place += len(spans[-1][1])
        return Places(spans)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the sample of each place of an epoch, and how often the epoch had it before; the last two are kept."""
        if epoch not in self._epochs:
            self._epochs = {old: kept for old, kept in self._epochs.items() if old == epoch - 1}
            plain = self._plain if self._repeats == 1 else self._repeated
            self._epochs[epoch] = plain(epoch) if self._members is None else self._balanced(epoch)
        return self._epochs[epoch]

    def _plain(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        return np.random.default_rng((self._seed, epoch)).permutation(self.count), None

    def _repeated(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return blocks of `apart` samples, each block `repeats` times in a row."""
        samples, _ = self._plain(epoch)
        block, inside = np.divmod(np.arange(self.count), self._apart * self._repeats)
        repeat, place = np.divmod(inside, self._apart)
        return samples[(block * self._apart + place) % self.count], repeat

    def _balanced(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._members is not None
        generator = np.random.default_rng((self._seed, epoch, _BALANCED))
        classes = len(self._members)
        quotas = np.full(classes, self.count // classes)
        quotas[generator.permutation(classes)[: self.count % classes]] += 1
        samples, repeats = [], []
        for members, quota in zip(self._members, quotas.tolist(), strict=True):
            rounds = -(-quota // len(members))
            drawn = [generator.permutation(members) for _ in range(rounds)]
            samples += [np.concatenate(drawn)[:quota]] if drawn else []
            repeats.append(np.repeat(np.arange(rounds), len(members))[:quota])
        shuffled = generator.permutation(self.count)
        return np.concatenate(samples)[shuffled], np.concatenate(repeats)[shuffled]


class StepSampler(Sampler[Places]):
    """The places of each step from `start` to `stop` for one process: a contiguous part of the global batch."""

    def __init__(
        self, order: Order, batch_size: int, start: int, stop: int, process: int = 0, processes: int = 1
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.start, self.stop = start, stop
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[Places]:
        for step in range(self.start, self.stop):
            yield self.order.step(step, self.batch_size, self.process, self.processes)


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the samples of each class that occurs, in ascending order."""
    starts = np.cumsum(np.unique(labels, return_counts=True)[1])[:-1]
    return np.split(np.argsort(labels, kind="stable"), starts)
