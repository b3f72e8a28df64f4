"""Parquet files.

datasets applies the column descriptions of the first file to all others. Therefore, each file's own description is read
here, and labels are matched by name. datasets also considers its cached copy current as long as path and modification
time are the same, which `cp -p`, archives and reproducible builds preserve; `_version_of` detects changed contents.
"""

import errno
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from resnext_hub.data.sources.parquet_shards import local_shard
from resnext_hub.data.sources.shards import Shards, folder_columns, group
from resnext_hub.data.sources.source import OpenDataset, Part
from resnext_hub.data.sources.streamed import StreamedTable
from resnext_hub.data.sources.walk import Tree, ignored
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import LFS_POINTER
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request


DAMAGED = (ValueError, TypeError, AttributeError, LookupError, RecursionError, NotImplementedError)
"""What datasets raises for invalid descriptions of columns."""

DAMAGED_FILE = (OSError, ValueError, NotImplementedError)
"""What reading the footer of a damaged parquet file raises."""

_SMALL = 256
"""Columns of at most this many compressed bytes per row are part of a file's version; images take more."""

_FOOTER_BYTES = 1 << 26
"""Most bytes of the footer that are part of a file's version; a file that is not parquet could state any length."""


class ParquetFiles:
    """A folder of parquet files."""

    def matches(self, request: "Request") -> bool:
        """Return whether the dataset consists of parquet files, with at most loose images beside them."""
        return bool(request.parquet)

    def open(self, request: "Request") -> OpenDataset:
        """Open the files of the requested configuration."""
        tree, files = request.tree, request.parquet
        loose = [f"{len(tree.images)} image files outside the parquet files"] if tree.images else []
        shards = group(request.root, files, request.config.dataset_config)
        opened = open_parquet(request.root, shards, request.config.streaming)
        return opened.with_notes(ignored(tree, files, loose))


def open_parquet(root: Path, shards: Shards, streaming: bool) -> OpenDataset:
    """Open parquet files.

    With streaming, they are read in place; else they are copied to the cache of datasets for random access. The copy is
    reused only for the same version of every file; datasets locks it while a process prepares it.

    Args:
        root: Their folder.
        shards: Their paths relative to it, by split.
        streaming: Whether to read them in place.

    Raises:
        RequestError: If one cannot be read, or a split is empty.
        RunError: If the cache is full, or a file changes while it is read.
    """
    splits = shards.splits
    files = sorted(file for members in splits.values() for file in members)
    for file in files:
        require_readable(root / file)
    version = "" if streaming else _version_of(root, files)
    parts = {file: read_part(root / file, file) for file in files}
    check_columns([*parts.values()])
    for split, members in splits.items():
        if not any(parts[file].rows for file in members):
            raise RequestError(
                f"the {printable(split)} split has no rows ({listing((root / file for file in members), 3)}); "
                "add rows, or move the split elsewhere"
            )
    # datasets fails on files without rows
    splits = {split: [file for file in members if parts[file].rows] for split, members in splits.items()}
    of_splits = {split: tuple(parts[file] for file in members) for split, members in splits.items()}
    if streaming:
        columns: dict[str, dict[str, str | int | None]] = {}
        tables: dict[str, Any] = {split: _in_place(root, of_split) for split, of_split in of_splits.items()}
    else:
        columns = folder_columns(files, parts[files[0]].features)
        copies = _copied(root, splits, version, parts)
        tables = {split: _with_columns(copy, of_splits[split], columns) for split, copy in copies.items()}
    return OpenDataset(
        tables=tables,
        parts={split: tuple(_stating(part, columns) for part in of_split) for split, of_split in of_splits.items()},
        files=tuple((file, (root / file).stat().st_size) for file in files),
        roots=(os.path.realpath(root),),
        notes=(*shards.notes, *_missing_shards(files)),
        configuration=shards.configuration,
    )


def _in_place(root: Path, parts: Sequence[Part]) -> StreamedTable:
    """Return files as a table that is read in place."""
    return StreamedTable(parts[0].features, tuple(local_shard(root / part.name) for part in parts))


def _copied(
    root: Path, splits: Mapping[str, Sequence[str]], version: str, parts: Mapping[str, Part]
) -> "Mapping[str, datasets.Dataset]":
    """Copy files to the cache of datasets, unless this version of them is there, and return the tables."""
    import datasets

    check_cache()
    data_files = {split: [glob.escape(str(root / file)) for file in members] for split, members in splits.items()}
    try:
        with quiet_library():
            # the description is part of the cache key
            tables = datasets.load_dataset(
                "parquet", data_files=data_files, description=version, features=_widened(parts)
            )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, NotImplementedError) as error:
        cause = error.__cause__ or error
        require_space(cause)
        raise RequestError(f"{printable(root)} cannot be read as parquet: {one_line(cause)}") from error
    if _version_of(root, [*parts]) != version:
        raise RunError(f"{printable(root)} changed while it was being read; rerun the same command")
    found: Mapping[str, datasets.Dataset] = tables
    return found


def _with_columns(table: Any, parts: Sequence[Part], columns: Mapping[str, Mapping[str, str | int | None]]) -> Any:
    """Return a table with the columns that are encoded in its files' folder names."""
    import numpy
    import pyarrow

    for name, values in columns.items():
        kind = _kind_of(values)
        distinct = pyarrow.array([values[part.name] for part in parts], kind.pa_type)
        rows = numpy.repeat(numpy.arange(len(parts)), [part.rows for part in parts])
        if len(rows) != len(table):
            raise RequestError(
                f"the files have {len(rows)} rows, but {len(table)} were read; delete the cached copy of this dataset "
                "and retry"
            )
        table = table.add_column(name, distinct.take(pyarrow.array(rows)), feature=kind)
    return table


def _stating(part: Part, columns: Mapping[str, Mapping[str, str | int | None]]) -> Part:
    return replace(part, features=part.features | {name: _kind_of(values) for name, values in columns.items()})


def _kind_of(values: Mapping[str, str | int | None]) -> "datasets.Value":
    import datasets

    return datasets.Value("int64" if all(isinstance(value, int) for value in values.values()) else "string")


def _version_of(root: Path, files: Iterable[str]) -> str:
    """Return a digest that changes with the content of the files, without reading the images.

    Writing or replacing a file updates its change time (ctime), which users cannot set, unlike the modification time.
    Some file systems have none, and many network and removable ones invent inodes, so footers and columns of few bytes
    per row are read as well: labels are never those of another version.

    Raises:
        RequestError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for name in files:
        path = root / name
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                stated = (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                digest.update(repr(stated).encode(errors="surrogateescape"))
                for start, length in [*_small_columns(file), _footer_place(file, status.st_size)]:
                    file.seek(start)
                    digest.update(file.read(length))
        except DAMAGED_FILE as error:
            raise RequestError(f"{printable(path)} cannot be read as parquet: {_reason_of(path, error)}") from error
    return digest.hexdigest()


def _small_columns(file: IO[bytes]) -> list[tuple[int, int]]:
    """Return offset and length of the column chunks with few bytes per row, such as labels."""
    from pyarrow import parquet

    content = parquet.ParquetFile(file).metadata
    pieces = [content.row_group(i).column(j) for i in range(content.num_row_groups) for j in range(content.num_columns)]
    return [
        (piece.dictionary_page_offset or piece.data_page_offset, piece.total_compressed_size)
        for piece in pieces
        if 0 <= piece.total_compressed_size <= _SMALL * max(1, piece.num_values)
    ]


def _footer_place(file: IO[bytes], size: int) -> tuple[int, int]:
    """Return offset and length of the footer of a parquet file."""
    file.seek(max(0, size - 8))
    length = min(int.from_bytes(file.read(4), "little"), _FOOTER_BYTES) + 8
    return max(0, size - length), length


def _missing_shards(files: Iterable[str]) -> tuple[str, ...]:
    """Return notes about missing shards, according to names such as train-00000-of-00005."""
    found: dict[tuple[str, str], set[int]] = {}
    for file in files:
        match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.parquet", file, re.ASCII | re.DOTALL)
        if match:
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return tuple(
        f"found {len(here)} of {int(total)} shards of {printable(name)}; number "
        f"{next(i for i in range(len(here) + 1) if i not in here)} is missing"
        for (name, total), here in found.items()
        if len(here) < int(total)
    )


def require_readable(path: Path) -> None:
    """Raise RequestError for a path that datasets cannot open, or would wait for forever."""
    if not path.is_file():
        raise RequestError(f"{printable(path)} is not a regular file; expected a parquet file")
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the path {printable(path)} is not valid UTF-8, which parquet files require; rename it"
        ) from error
    if "::" in os.path.abspath(path):
        raise RequestError(
            f"the path {printable(os.path.abspath(path))} contains '::', which datasets would interpret as chained "
            "URLs; rename the file or folder"
        )


def read_part(path: Path, name: str) -> Part:
    """Read the number of rows and the columns of a parquet file.

    Raises:
        RequestError: If it cannot be read.
    """
    require_readable(path)
    try:
        with open(path, "rb") as file:
            return part_of(file, name)
    except DAMAGED_FILE as error:
        raise RequestError(f"{printable(path)} cannot be read as parquet: {_reason_of(path, error)}") from error


def _reason_of(path: Path, error: BaseException) -> str:
    return "zero bytes" if path.stat().st_size == 0 else pointer_reason(path) or one_line(error)


def pointer_reason(path: Path) -> str | None:
    """Return the reason if a file is a Git LFS pointer instead of its content, else None."""
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return "it is a Git LFS pointer; run `git lfs pull` in its repository" if is_pointer else None


def _widened(parts: Mapping[str, Part]) -> "datasets.Features | None":
    """Return the columns with integers as wide as in the widest file, or None if the first file already has them.

    datasets would cast integers of the other files to the first file's type.
    """
    import datasets
    import pyarrow

    kinds = [part.features for part in parts.values()]
    wide = dict(kinds[0])
    for column in wide:
        if all(isinstance(kind[column], datasets.Value) for kind in kinds):
            types = {kind[column].pa_type for kind in kinds}
            if len(types) > 1 and all(map(pyarrow.types.is_integer, types)):
                is_huge = pyarrow.uint64() in types and not any(map(pyarrow.types.is_signed_integer, types))
                wide[column] = datasets.Value("uint64" if is_huge else "int64")
    return datasets.Features(wide) if wide != kinds[0] else None


def check_columns(parts: Sequence[Part]) -> None:
    """Raise RequestError unless all files have the same columns."""
    for part in parts:
        if part.features.keys() != parts[0].features.keys():
            raise RequestError(
                f"{printable(part.name)} has the columns {listing(part.features)}, but {printable(parts[0].name)} has "
                f"{listing(parts[0].features)}; store the same columns in all files, or move one of the files elsewhere"
            )


def part_of(file: IO[bytes], name: str) -> Part:
    """Read the number of rows and the columns of an open parquet file.

    Raises:
        ValueError: If it is not a parquet file that datasets can read.
    """
    from pyarrow import parquet

    return part_from(parquet.read_metadata(file), name)


def part_from(metadata: Any, name: str) -> Part:
    """Return the number of rows and the columns of a parquet file, given its parsed footer; see `part_of`."""
    import datasets

    if metadata.num_rows and not metadata.row_group(0).num_rows:  # datasets fails on it
        raise ValueError("its first row group is empty; rewrite the file without it")
    try:
        features = datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
    except DAMAGED as error:
        raise ValueError(f"its schema is damaged ({one_line(error)})") from error
    return Part(name, metadata.num_rows, dict(features))


def has_images(features: "datasets.Features | dict[str, Any]") -> bool:
    """Return whether a file has a column that could contain images."""
    import datasets

    return any(isinstance(kind, datasets.Image) or is_encoded_image(kind) for kind in features.values())


def is_encoded_image(feature: Any) -> bool:
    """Return whether a column without type metadata could contain images: bytes, or a struct of bytes and path."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def parquet_files(tree: Tree) -> list[str]:
    """Return the parquet files of a folder."""
    return [path for path in tree.others if path.lower().endswith(".parquet")]


@contextmanager
def quiet_library() -> Iterator[None]:
    """Silence the log messages of datasets about errors that it also raises."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def require_space(error: BaseException) -> None:
    """Raise RunError if an error means that the disk of the cache is full."""
    import datasets

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cache = printable(datasets.config.HF_DATASETS_CACHE)
        raise RunError(
            f"the disk that holds the cache {cache} is full; free up space, or set HF_HOME to another disk"
        ) from error


def check_cache() -> None:
    """Raise RequestError if the cache of datasets is not writable."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(cache, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    if reason:
        raise RequestError(f"the cache {printable(cache)} is not writable ({reason}); set HF_HOME to a writable folder")
