"""Parquet files that are read in place, row group by row group.

The footer of a file is read once, and kept with its shard. Those of files on a server are also kept in the cache, so
that the processes of a machine, and the next runs, do not read them again.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from resnext_hub.data.sources.ranges import RangeFile, Remote, find_remote, read_range
from resnext_hub.data.sources.streamed import NOTHING, Row, stored_row
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import write_atomic
from resnext_hub.machine import cache_folder
from resnext_hub.text import printable

_AT_ONCE = 16
"""Number of footers that are requested concurrently."""

_END = b"PAR1"
_GUESS = 100
"""Fraction of a file that is requested for its footer first; few footers are larger."""


@dataclass(frozen=True, eq=False)
class ParquetShard:
    """A parquet file, on this machine or on a server."""

    file: Path | Remote
    footer: bytes
    """Its end, from the metadata on."""

    @property
    def name(self) -> str:
        """Its name in messages, without secrets."""
        return self.file.name

    @cached_property
    def groups(self) -> np.ndarray:
        """Rows of each row group."""
        metadata = _metadata(self.footer)
        return np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64)

    @property
    def metadata(self) -> Any:
        """The parsed footer."""
        return _metadata(self.footer)

    def read(self, first: int, last: int, label_column: str, image_column: str | None) -> Sequence[Row]:
        """Read rows; see `Shard`."""
        import datasets
        from pyarrow import parquet

        ends = np.cumsum(self.groups)
        begin, end = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1
        before = int(ends[begin - 1]) if begin else 0
        columns = [label_column] if image_column is None else [image_column, label_column]
        with open(self.file, "rb") if isinstance(self.file, Path) else RangeFile(self.file) as source:
            content = parquet.ParquetFile(source, metadata=self.metadata, pre_buffer=True)
            table = content.read_row_groups(list(range(begin, end)), columns=columns, use_threads=False)
        table = table.slice(first - before, last - first)
        labels = table[label_column].to_pylist()
        if image_column is None:
            return [(NOTHING, label) for label in labels]
        images = chain.from_iterable(map(datasets.Image().cast_storage, table[image_column].chunks))
        return [(stored_row(image), label) for image, label in zip(images, labels, strict=True)]


def local_shard(path: Path) -> ParquetShard:
    """Open a parquet file on this machine.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)

        def read(first: int, last: int) -> bytes:
            file.seek(first)
            return file.read(last - first)

        return ParquetShard(path, _footer(size, read))


def remote_shards(files: Sequence[tuple[str, str]], fixed: bool) -> list[ParquetShard]:
    """Open parquet files on a server.

    Args:
        files: Address and name of each.
        fixed: Whether their content cannot change, as at a commit on the Hub; then nothing is requested of files whose
            footers are in the cache.

    Raises:
        RequestError: If the cache cannot be written.
        OSError, HTTPError, ValueError: If a file cannot be read.
    """
    from filelock import FileLock

    path = cache_folder() / "footers" / f"{_digest(' '.join(url for url, _ in files))}.arrow"
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise RequestError(
            f"{printable(path.parent)} cannot be written to ({(error.strerror or one_line(error)).lower()}); set "
            "RESNEXT_HUB_CACHE to a writable folder"
        ) from error
    with lock, ThreadPoolExecutor(_AT_ONCE) as pool:
        known = _read_cache(path)

        def opened(file: tuple[str, str]) -> ParquetShard:
            url, name = file
            size, version, footer = known.get(_digest(url), (0, "", b""))
            if footer and fixed:
                return ParquetShard(Remote(url, name, size, version), footer)
            remote = find_remote(url, name, fixed)
            if footer and remote.version and (remote.size, remote.version) == (size, version):
                return ParquetShard(remote, footer)
            return ParquetShard(remote, _footer(remote.size, lambda first, last: read_range(remote, first, last)))

        shards = list(pool.map(opened, files))
        _write_cache(path, known, shards)
    return shards


_Known = dict[str, tuple[int, str, bytes]]
"""Size, version and footer of files, by the digest of their address, which may contain secrets."""


def _read_cache(path: Path) -> _Known:
    import pyarrow

    try:
        columns = pyarrow.ipc.open_file(path.read_bytes()).read_all().to_pydict()
        return {key: (size, version, footer) for key, size, version, footer in zip(*columns.values(), strict=True)}
    except (OSError, ValueError):  # missing, or damaged
        return {}


def _write_cache(path: Path, known: _Known, shards: Sequence[ParquetShard]) -> None:
    import pyarrow

    found: _Known = {}
    for shard in shards:
        assert isinstance(shard.file, Remote)
        found[_digest(shard.file.url)] = (shard.file.size, shard.file.version, shard.footer)
    if found == known:
        return
    sizes, versions, footers = zip(*found.values(), strict=True)
    table = pyarrow.table({"url": list(found), "size": sizes, "version": versions, "footer": footers})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_atomic(path, sink.getvalue().to_pybytes())


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:32]


@lru_cache(maxsize=256)
def _metadata(footer: bytes) -> Any:
    import pyarrow
    from pyarrow import parquet

    return parquet.read_metadata(pyarrow.BufferReader(_END + footer))


def _footer(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """Read the end of a parquet file, from its metadata on."""
    tail = read(max(0, size - max(size // _GUESS, 8)), size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != _END or length > size:
        raise ValueError("it is not a parquet file" if size else "zero bytes")
    if len(tail) < length:
        tail = read(size - length, size - len(tail)) + tail
    footer = tail[-length:]
    _metadata(footer)
    return footer
