"""Detect unused tables beside class folders that list the images, because then the folders may not be the classes.

Tables are only searched for the names of images, whatever their format and columns.
"""

import os
import posixpath
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

from resnext_hub.data.sources.names import FILE_COLUMN, loose_role, split_role
from resnext_hub.data.sources.table_files import LABEL_TABLES
from resnext_hub.data.sources.walk import Tree, is_image
from resnext_hub.errors import RequestError, setting
from resnext_hub.files import require_regular
from resnext_hub.text import listing, printable

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")

_LISTS = (".txt", ".lst")
"""Suffixes of files that are searched only if they are named like a split."""

_WHOLE = (".json", ".xlsx")
"""Suffixes of files that are searched as a single row."""

_BYTES = 1 << 24
"""Total size that is searched, the smallest tables first."""

_START = 1 << 22
"""Size that is searched at the beginning of each table."""

_ROWS = 200_000
"""Number of rows that are searched."""

_MANY = 1000
"""A table that lists this many images is relevant, even if they are less than half of any folder."""


@dataclass
class _Found:
    """What a table contains about the images."""

    named: set[int] = field(default_factory=set)
    """Images that it lists."""
    agrees: bool = True
    """Whether each row with an image also contains its class folder."""
    groups: bool = False
    """Whether it has other values that several images share, like classes."""
    roles: set[str | None] = field(default_factory=set)
    """Roles of the splits whose names it contains."""


def reject_unread_tables(tree: Tree, splits: Sequence[Mapping[str, Sequence[int]]], layout: str) -> list[str]:
    """Raise RequestError if an unused table lists the images and could define their classes or splits.

    A table is ignored if it lists only few images (less than half of every folder), has no two values that several
    images share, or only repeats the names of the class folders, without splits.

    Args:
        tree: The files of the dataset.
        splits: The images of each class folder, for each split.
        layout: Value of the setting `layout` that confirms the layout found.

    Returns:
        Notes on ignored tables.
    """
    paths, large = _tables(tree)
    class_of = {i: name for classes in splits for name, images in classes.items() for i in images} if paths else {}
    folders = Counter(posixpath.dirname(tree.images[i]) for i in class_of)
    remedy = f"if the folders {listing(sorted(set(class_of.values())), 4)} are the classes, use "
    remedy += setting("layout", layout)
    notes = [f"too large to be searched for the names of images: {listing(large, 4)}"] if large else []
    for path in paths:
        rows = _rows(tree, path)
        found = _compare(tree, class_of, rows, path.lower().endswith(_WHOLE))
        named = Counter(posixpath.dirname(tree.images[i]) for i in found.named)
        where = printable(tree.root / path)
        if len(splits) == 1 and _is_split(path) and 0 < len(found.named) < len(class_of):
            raise RequestError(
                f"{where} lists {len(found.named)} of {len(class_of)} images and looks like a split list, which is "
                "not supported; add a metadata.csv with the columns file_name, label and split, or, to hold out a "
                f"random part instead, use {setting('layout', layout)}"
            )
        most = len(found.named) >= _MANY or any(2 * named[folder] >= folders[folder] for folder in named)
        if path.lower().endswith(_LISTS) or not most:
            continue
        if found.agrees and not (len(splits) == 1 and found.roles >= {"train", "eval"}):
            notes.append(f"ignored {printable(path)}, which lists the images with the names of their class folders")
        elif found.groups and _is_metadata(path, rows):
            raise RequestError(
                f"{where} has no column named label; choose its label column with {setting('label_column')}; {remedy}"
            )
        elif found.groups:
            readable = path.lower().endswith(LABEL_TABLES)
            way = f"use {setting('dataset', tree.root / path)}" if readable else "convert it to CSV, and use that file"
            raise RequestError(
                f"{where} lists images of the dataset, but is not used; if it defines the classes or splits, {way}; "
                f"{remedy}"
            )
    return notes


def _tables(tree: Tree) -> tuple[list[str], list[str]]:
    """Return the tables to search, and those that are too large."""
    sizes = []
    for path in tree.others:
        if path.lower().endswith(_SUFFIXES) or (path.lower().endswith(_LISTS) and _is_split(path)):
            place = tree.root / path
            if place.is_file():
                sizes.append((place.stat().st_size, path))
    paths, large, total = list[str](), list[str](), 0
    for size, path in sorted(sizes):
        total += min(size, _START) + 1000  # the cost of opening it
        (paths if total <= _BYTES else large).append(path)
    return paths, large


def _is_split(path: str) -> bool:
    return loose_role(posixpath.basename(path).rpartition(".")[0]) is not None


def _is_metadata(path: str, rows: Sequence[Sequence[str]]) -> bool:
    return posixpath.basename(path).lower().startswith("metadata.") and any("file_name" in row for row in rows[:1])


def _rows(tree: Tree, path: str) -> list[list[str]]:
    """Return the rows of cells of a table, casefolded; none if it cannot be read."""
    kind = path.rpartition(".")[2].lower()
    try:
        require_regular(tree.root / path)
        with open(tree.root / path, "rb") as file:
            if kind == "parquet":
                return [[str(cell).casefold() for cell in row] for row in islice(_parquet_rows(file), _ROWS)]
            data = _shared_strings(file) if kind == "xlsx" else file.read(_START)
    except OSError:
        return []
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if utf16 else "utf-8-sig", "replace").casefold()
    if kind == "xlsx":
        return [re.findall(r"<t[^<>]*>([^<]*)</t>", text)]
    if kind in ("json", "jsonl", "ndjson"):
        pattern = re.compile(r'"([^"]*)"|(?<=[:,\[ ])(\d+)')
        parts = [text] if kind == "json" else text.splitlines()[:_ROWS]
        return [[match[1] or match[2] or "" for match in pattern.finditer(part)] for part in parts]
    ends = re.compile(r'[,;|\t"]+' if kind in ("csv", "tsv") else r'[,;|\s"]+')
    return [[cell.strip() for cell in ends.split(line)] for line in text.splitlines()[:_ROWS] if line.strip()]


def _parquet_rows(file: IO[bytes]) -> Iterator[Sequence[object]]:
    import pyarrow
    from pyarrow import parquet, types

    try:
        content = parquet.ParquetFile(file)
        columns = [field.name for field in content.schema_arrow if types.is_string(field.type)]
        columns += [field.name for field in content.schema_arrow if types.is_integer(field.type)]
        for batch in content.iter_batches(columns=columns[:16]):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):  # a stray file
        return


def _shared_strings(file: IO[bytes]) -> bytes:
    """Return the part of a spreadsheet that contains the texts of all cells."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("xl/sharedStrings.xml") as strings:
            return strings.read(_START)
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, RuntimeError, NotImplementedError):
        # damaged, not a spreadsheet, encrypted, or compressed in a way that zipfile does not support
        return b""


def _compare(tree: Tree, class_of: Mapping[int, str], rows: Sequence[Sequence[str]], whole: bool) -> _Found:
    owners = _owners(tree, class_of, rows)
    found = _Found()
    if not owners:
        return found
    others: Counter[str] = Counter()
    count = 0
    for row in rows:
        images = {i for cell in row for i in _images_of(tree, owners, cell)}
        if not images:
            continue
        count += 1
        classes = {class_of[i].casefold() for i in images}
        found.named |= images
        found.agrees &= (classes <= set(row)) if whole else not classes.isdisjoint(row)
        others.update(cell for cell in set(row) if _key(cell) not in owners)
    shared = [cell for cell, times in others.items() if cell and 1 < times < count]
    found.groups = whole or len(shared) > 1
    found.roles = {split_role(cell) for cell in others}
    return found


def _owners(tree: Tree, images: Iterable[int], rows: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Return the images by those of their names, with or without suffix, that occur in a table."""
    cells = {_key(cell) for row in rows for cell in row}
    numbers = bool(rows) and any(map(FILE_COLUMN.search, rows[0]))
    owners: dict[str, list[int]] = defaultdict(list)
    for i in images:
        name = posixpath.basename(tree.images[i]).casefold()
        for key in {name, os.path.splitext(name)[0]} & cells:
            if is_image(key) or numbers or not re.fullmatch(r".|\d{1,4}", key):
                owners[key].append(i)
    return owners


def _images_of(tree: Tree, owners: Mapping[str, Collection[int]], cell: str) -> Collection[int]:
    """Return the images that a cell refers to, preferring those in the folder that it contains."""
    images = owners.get(_key(cell), ())
    folder = "/".join(cell.replace("\\", "/").split("/")[-2:-1])
    inside = [i for i in images if posixpath.basename(posixpath.dirname(tree.images[i])).casefold() == folder]
    return inside or images


def _key(cell: str) -> str:
    return cell.replace("\\", "/").rpartition("/")[2]
