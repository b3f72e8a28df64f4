"""Tables beside class folders that name the images and are not read: the folders may be no classes then.

The content is only searched for names of images, whatever the table's format and its columns are.
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

from resnext_hub.data.sources.names import loose_role, split_role
from resnext_hub.data.sources.walk import Tree, is_image
from resnext_hub.errors import RequestError
from resnext_hub.files import require_regular
from resnext_hub.text import listing, printable

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")

_LISTS = (".txt", ".lst")
"""Suffixes of files that are searched only if they are called like a split."""

_WHOLE = (".json", ".xlsx")
"""Suffixes of files in which a row is not told from the next."""

_BYTES = 1 << 24
"""Size of all that is searched together, the smallest tables first."""

_START = 1 << 22
"""Size of the beginning of a table that is searched."""

_ROWS = 200_000
"""Number of rows that are searched."""

_MANY = 1000
"""Number of images that are many, although they may be less than half of those of their folder."""

_NAMING = re.compile(r"(?:^|[^a-z])(?:id|image|img|file|filename|path|name)(?:$|[^a-z])")
"""What a column of file names is called; its numbers are names, too."""


@dataclass
class _Found:
    """What a table says of the images."""

    named: set[int] = field(default_factory=set)
    """Images that it names."""
    agrees: bool = True
    """Whether each row that names an image names its class folder, too."""
    groups: bool = False
    """Whether it has other values that several images share, as classes are."""
    roles: set[str | None] = field(default_factory=set)
    """What the splits are for that it has names of."""


def refuse_unread_tables(tree: Tree, splits: Sequence[Mapping[str, Sequence[int]]], layout: str) -> list[str]:
    """Refuse a table that names the images of a folder and could say their classes or splits; note what is left out.

    It is left out where it names less than half of the images of every folder and not many, gives no two values that
    several images share, or repeats the names of the class folders and no splits.

    Args:
        tree: The files.
        splits: The images of each class folder, for each split.
        layout: Value of `--layout` that stands for what was found.

    Raises:
        RequestError: If there is such a table.
    """
    paths, large = _tables(tree)
    class_of = {i: name for classes in splits for name, images in classes.items() for i in images} if paths else {}
    folders = Counter(posixpath.dirname(tree.images[i]) for i in class_of)
    way_out = f"if the folders {listing(sorted(set(class_of.values())), 4)} are the classes, add --layout {layout}"
    notes = [f"too large to be searched for names of images: {listing(large, 4)}"] if large else []
    for path in paths:
        rows = _rows(tree, path)
        found = _compare(tree, class_of, rows, path.lower().endswith(_WHOLE))
        named = Counter(posixpath.dirname(tree.images[i]) for i in found.named)
        where = printable(tree.root / path)
        if len(splits) == 1 and _is_split(path) and 0 < len(found.named) < len(class_of):
            raise RequestError(
                f"{where} names {len(found.named)} of {len(class_of)} images, as a split, but is ignored: add a "
                f"metadata.csv with the columns file_name, label and split; to hold out a part instead, {way_out}"
            )
        most = len(found.named) >= _MANY or any(2 * named[folder] >= folders[folder] for folder in named)
        if path.lower().endswith(_LISTS) or not most:
            continue
        if found.agrees and not (len(splits) == 1 and found.roles >= {"train", "eval"}):
            notes.append(f"left out: {printable(path)}, which names images and the folders of their classes")
        elif found.groups and _is_metadata(path, rows):
            raise RequestError(
                f"{where} has no column called label: name the column of classes with --label-column; {way_out}"
            )
        elif found.groups:
            raise RequestError(
                f"{where} names images of the dataset and is not read: if it says the classes or splits, name it "
                "metadata.csv, with the columns file_name (as seen from the table), label and, if there are splits, "
                f"split; {way_out}"
            )
    return notes


def _tables(tree: Tree) -> tuple[list[str], list[str]]:
    """Return the files to search, and those that are too large."""
    sizes = []
    for path in tree.others:
        if path.lower().endswith(_SUFFIXES) or (path.lower().endswith(_LISTS) and _is_split(path)):
            place = tree.root / path
            if place.is_file():
                sizes.append((place.stat().st_size, path))
    paths, large, total = list[str](), list[str](), 0
    for size, path in sorted(sizes):
        total += min(size, _START) + 1000  # for opening it
        (paths if total <= _BYTES else large).append(path)
    return paths, large


def _is_split(path: str) -> bool:
    return loose_role(posixpath.basename(path).rpartition(".")[0]) is not None


def _is_metadata(path: str, rows: Sequence[Sequence[str]]) -> bool:
    return posixpath.basename(path).lower().startswith("metadata.") and any("file_name" in row for row in rows[:1])


def _rows(tree: Tree, path: str) -> list[list[str]]:
    """Return the cells of a table, row by row, in lower case; none if it cannot be read."""
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
    """Return the part of a spreadsheet that holds the texts of all its cells."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("xl/sharedStrings.xml") as strings:
            return strings.read(_START)
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, RuntimeError, NotImplementedError):
        # damaged, no spreadsheet, encrypted, or compressed in a way that zipfile does not know
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
    """Return the images whose names, with their suffix or without, stand in a table."""
    cells = {_key(cell) for row in rows for cell in row}
    numbers = bool(rows) and any(map(_NAMING.search, rows[0]))
    owners: dict[str, list[int]] = defaultdict(list)
    for i in images:
        name = posixpath.basename(tree.images[i]).casefold()
        for key in {name, os.path.splitext(name)[0]} & cells:
            if is_image(key) or numbers or not re.fullmatch(r".|\d{1,4}", key):
                owners[key].append(i)
    return owners


def _images_of(tree: Tree, owners: Mapping[str, Collection[int]], cell: str) -> Collection[int]:
    """Return the images that a cell names; those in the folder that it names, if there are any."""
    images = owners.get(_key(cell), ())
    folder = "/".join(cell.replace("\\", "/").split("/")[-2:-1])
    inside = [i for i in images if posixpath.basename(posixpath.dirname(tree.images[i])).casefold() == folder]
    return inside or images


def _key(cell: str) -> str:
    return cell.replace("\\", "/").rpartition("/")[2]
