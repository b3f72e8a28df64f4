"""Long sequences of text in Arrow memory: a file name takes a third of the bytes of a Python string in a list."""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, overload

from resnext_hub.data.sources.walk import real_path, stored_path

_CHUNK = 1 << 16
"""Values per Arrow array; only this many are Python objects at a time."""

_MEMO = 1 << 14
"""Most distinct values of a column whose Python objects are shared by its rows."""

_INTEGER = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)  # 007 is text
_NUMBER = re.compile(r"[-+]?\d*\.\d+([eE][-+]?\d+)?|[-+]?\d+\.?|nan", re.ASCII)


class Texts(Sequence[str]):
    """A sequence of strings, which may be iterated any number of times.

    Args:
        values: The first strings; surrogates are not allowed.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._chunks: list[Any] = []
        self._starts = array("q")
        self._last: list[str] = []
        self._stored = 0
        for value in values:
            self.append(value)

    def append(self, value: str) -> None:
        """Add a string at the end."""
        self._last.append(value)
        if len(self._last) == _CHUNK:
            import pyarrow

            self._starts.append(self._stored)
            self._chunks.append(pyarrow.array(self._last, pyarrow.large_string()))
            self._stored += _CHUNK
            self._last = []

    def __len__(self) -> int:
        return self._stored + len(self._last)

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            yield from chunk.to_pylist()
        yield from self._last

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        index = range(len(self))[place]
        if index >= self._stored:
            return self._last[index - self._stored]
        chunk = bisect_right(self._starts, index) - 1
        return str(self._chunks[chunk][index - self._starts[chunk]].as_py())


class TextColumn(Sequence[Any]):
    """A column of a CSV file: integers or floats if all of its values are, and None for empty ones.

    Args:
        texts: The values as they are in the file.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts if isinstance(texts, Texts) else Texts(texts)

    @cached_property
    def _kind(self) -> type[int] | type[float] | type[str]:
        if all(not text or _INTEGER.fullmatch(text) for text in self.texts):
            return int
        is_number = all(not text or _NUMBER.fullmatch(text) for text in self.texts)
        return float if is_number and any("." in text for text in self.texts) else str

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Any]:
        kind, memo = self._kind, dict[str, Any]({"": None})
        for text in self.texts:
            if text in memo:
                yield memo[text]
                continue
            value = kind(text)
            if len(memo) < _MEMO:
                memo[text] = value
            yield value

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        found = self.texts[place]
        if isinstance(found, str):
            return self._kind(found) if found else None
        return [self._kind(text) if text else None for text in found]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TextColumn):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment] # as for a list


class Files(Sequence[tuple[str, int]]):
    """Names and sizes in bytes of files, such as the images of a dataset.

    Args:
        names: Paths.
        sizes: Size of each.
        chosen: Indices of the files, in their order; all if not given.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], chosen: Iterable[int]) -> None:
        self._names = Texts()
        self._sizes = array("q")
        for index in chosen:
            self._names.append(stored_path(names[index]))
            self._sizes.append(sizes[index])

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(map(real_path, self._names), self._sizes, strict=True)

    @overload
    def __getitem__(self, place: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[tuple[str, int]]: ...
    def __getitem__(self, place: int | slice) -> tuple[str, int] | Sequence[tuple[str, int]]:
        if isinstance(place, slice):
            return list(islice(self, *place.indices(len(self)))) if (place.step or 1) > 0 else list(self)[place]
        return real_path(self._names[place]), self._sizes[place]


class NameIndex:
    """Finds the place of a name in a sequence, with 16 bytes per name; a dictionary would take six times as much.

    Names are compared by hash, so that whoever uses the index has to compare what it finds.

    Args:
        names: The names; one may occur several times.
    """

    def __init__(self, names: Iterable[str]) -> None:
        import numpy

        hashes = numpy.fromiter(map(hash, names), numpy.int64)
        order = numpy.argsort(hashes, kind="stable")
        hashes = hashes[order]
        bits = max(len(hashes).bit_length() - 1, 1)
        self._half, self._shift = 1 << (bits - 1), 64 - bits
        # buckets of hashes with the same first bits, about two in each
        bounds = numpy.arange(-self._half, self._half, dtype=numpy.int64) << self._shift
        starts = numpy.append(numpy.searchsorted(hashes, bounds), len(hashes))
        # arrays of the standard library return their elements sooner than NumPy's
        self._hashes = array("q", hashes.tobytes())
        self._places, self._starts = (array("i", values.astype(numpy.int32).tobytes()) for values in (order, starts))

    def find(self, name: str) -> Iterator[int]:
        """Yield the places of a name in their order, and perhaps those of other names."""
        wanted = hash(name)
        bucket = (wanted >> self._shift) + self._half
        at = bisect_left(self._hashes, wanted, self._starts[bucket], self._starts[bucket + 1])
        while at < len(self._hashes) and self._hashes[at] == wanted:
            yield self._places[at]
            at += 1
