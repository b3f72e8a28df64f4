"""Images with a table of any name, such as `labels.csv`: found beside the images, or requested as the dataset itself.

Unlike `metadata.csv`, such a table has no fixed columns and perhaps no header: the column whose values are the names of
images contains the file names. They may lack folders or the suffix, as long as each matches one image.
"""

import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_hub.data.sources.finders import ImageFinder, split_of
from resnext_hub.data.sources.folders import IMAGE_FOLDERS
from resnext_hub.data.sources.names import FILE_COLUMN, LABEL_NAMES, loose_role
from resnext_hub.data.sources.parquet import has_images, read_part
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.table_columns import FILE_NAME, SPLIT, Table, label_column_of
from resnext_hub.data.sources.table_files import LABEL_TABLES, read_table
from resnext_hub.data.sources.tables import open_tables
from resnext_hub.data.sources.texts import TextColumn
from resnext_hub.data.sources.walk import Tree, ignored, image_entry, is_hidden, is_image, sorted_images, walk
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    from resnext_hub.data.sources.request import Request

_logger = logging.getLogger(__name__)

_SAMPLE = 1000
"""Number of values that decide which column contains file names."""


class TableFile:
    """A table of images and labels, requested as the dataset."""

    def matches(self, request: "Request") -> bool:
        """Return whether a file is requested that is a table without images in it."""
        path = request.path
        if path is None or not path.is_file() or not path.name.lower().endswith(LABEL_TABLES):
            return False
        return not path.name.lower().endswith(".parquet") or not has_images(read_part(path, path.name).features)

    def open(self, request: "Request") -> OpenDataset:
        """Open the images that it lists."""
        assert request.path is not None
        return _open(request, *_requested(request.path, request.config.label_column))


class ListedImages:
    """A folder of images without class folders, and a table that lists them."""

    def matches(self, request: "Request") -> bool:
        """Return whether there is such a table."""
        return bool(request.listed)

    def open(self, request: "Request") -> OpenDataset:
        """Open the images that it lists."""
        return _open(request, request.tree, request.listed, request.finder)


def find_listed(tree: Tree, requested: str | None, find: Callable[[], ImageFinder]) -> list[Table]:
    """Return the table that lists the images of a folder without class folders, or those of its splits.

    Args:
        tree: The files of the dataset.
        requested: The requested label column.
        find: Returns what finds the image of a row; only called if there is a table.

    Raises:
        RequestError: If several tables list images and are not those of splits, or the only table cannot be read.
    """
    if not tree.images or not _without_classes(tree):
        return []
    wanted = {SPLIT, *LABEL_NAMES, requested or SPLIT}
    found, errors = list[Table](), list[RequestError]()
    for path in tree.others:
        if path.lower().endswith(LABEL_TABLES):
            try:
                columns, skipped = read_table(tree.root / path, wanted, len(tree.images))
            except RequestError as error:
                if split_of(Table(path, {})):
                    raise
                errors.append(error)
                continue
            read = Table(path, columns, tuple(skipped))
            table = _as_listed(read, find(), needed=0.0 if split_of(read) else 0.5)
            if table is not None and len(table.columns) > 1:
                found.append(table)
    if not found and errors:
        raise errors[0]
    for failure in errors:
        _logger.warning("ignored a table: %s", failure)
    splits = [split_of(table) for table in found]
    if len(found) < 2 or not all(splits) or len(set(splits)) < len(splits):
        _require_one(tree, found)
        return found
    return [
        replace(table, columns=table.columns | {SPLIT: [split] * table.rows})
        for table, split in zip(found, splits, strict=True)
    ]


def _open(request: "Request", tree: Tree, tables: list[Table], find: ImageFinder) -> OpenDataset:
    request.require_no_streaming()
    label_column = label_column_of(tree, tables, request.config.label_column, classless=True)
    assert label_column is not None
    opened = open_tables(tree, tables, label_column, request.config.eval_split, find)
    return opened.with_notes(ignored(tree, [table.path for table in tables]))


def _require_one(tree: Tree, tables: Sequence[Table]) -> None:
    if len(tables) > 1:
        raise RequestError(
            f"{printable(tree.root)} has several tables that list its images "
            f"({listing(table.path for table in tables)}); choose one, such as "
            f"{setting('dataset', tree.root / tables[0].path)}"
        )


def _without_classes(tree: Tree) -> bool:
    """Return whether images are in one folder, apart from folders of splits and folders that are called `images`."""

    def could_be_class(name: str) -> bool:
        return loose_role(name) is None and name.lower() not in IMAGE_FOLDERS

    return len({tuple(filter(could_be_class, folder.split("/"))) for folder in tree.image_folders}) == 1


def _requested(path: Path, label_column: str | None) -> tuple[Tree, list[Table], ImageFinder]:
    """Return the images around a requested table, the table, and what finds the image of a row.

    Raises:
        RequestError: If none of its columns contains names of images.
    """
    columns, skipped = read_table(path, {SPLIT, *LABEL_NAMES, label_column or SPLIT})
    tree = _images_around(path, columns.values())
    name = os.path.relpath(path.absolute(), tree.root.absolute()).replace(os.sep, "/")
    find = ImageFinder(tree)
    table = _as_listed(Table(name, columns, tuple(skipped)), find, needed=0.0)
    if table is None:
        texts = (str(value) for values in columns.values() for value in values[:1] if isinstance(value, str))
        example = next(filter(is_image, texts), None)
        raise RequestError(
            f"{printable(path)}: none of the images that it lists exists, for example {printable(example)}; expected "
            "paths relative to the table"
            if example
            else f"{printable(path)} has no column of images, or of the names of images in {printable(path.parent)}; "
            f"its columns: {listing(columns)}"
        )
    return tree, [table], find


def _as_listed(table: Table, find: ImageFinder, needed: float) -> Table | None:
    """Return a table with its column of file names renamed to `file_name`, or None if there is no such column.

    Args:
        table: The table as it was read.
        find: Finds images.
        needed: Fraction of a column's values, or of all images, that have to be found.
    """
    best = _file_column(table, find, needed)
    if best is None:
        return None
    has_header = FILE_COLUMN.search(best) or any(name.casefold() in (SPLIT, *LABEL_NAMES) for name in table.columns)
    is_text = table.path.lower().endswith((".csv", ".tsv"))
    if is_text and not has_header and find.candidates(table, best):  # the first row is not a header
        rows = [TextColumn(chain([name], _texts_of(values))) for name, values in table.columns.items()]
        names = [str(i) for i in range(len(rows))]
        place = list(table.columns).index(best)
        names[place] = FILE_NAME
        return replace(table, columns=dict(zip(names, rows, strict=True)))
    others = {name: values for name, values in table.columns.items() if name not in (best, FILE_NAME)}
    return replace(table, columns={FILE_NAME: table.columns[best]} | others)


def _file_column(table: Table, find: ImageFinder, needed: float) -> str | None:
    """Return the column with the names of images; see `_as_listed`.

    Raises:
        RequestError: If several columns have names of different images, such as those of images and masks.
    """
    found: dict[str, tuple[int, list[tuple[int, ...] | None]]] = {}
    for column, values in table.columns.items():
        texts = [str(v) if isinstance(v, (str, int)) else "" for v in values[:: max(1, len(values) // _SAMPLE)]]
        if not FILE_COLUMN.search(column):
            texts = ["" if re.fullmatch(r"\d{1,4}", text) else text for text in texts]
        images = [tuple(find.candidates(table, text)) or None if text else None for text in texts]
        hits = {image for image in images if image}
        if hits and len(hits) >= needed * min(len(set(texts)), find.count):
            found[column] = (sum(map(is_image, texts)), images)
    with_suffix = [column for column, (count, images) in found.items() if 2 * count > len(images)]
    likely = with_suffix or sorted(found, key=lambda column: -len({image for image in found[column][1] if image}))[:1]
    for other in likely[1:]:
        pairs = zip(found[likely[0]][1], found[other][1], strict=True)
        if any(a and b and a != b for a, b in pairs):
            raise RequestError(
                f"the columns {printable(likely[0])} and {printable(other)} of {printable(table.path)} contain the "
                "names of different images; keep only one of them"
            )
    return likely[0] if likely else None


def _texts_of(values: Sequence[Any]) -> Iterable[str]:
    return values.texts if isinstance(values, TextColumn) else ("" if v is None else str(v) for v in values)


def _images_around(path: Path, columns: Iterable[Sequence[Any]]) -> Tree:
    """List the folders that a table refers to; if most paths lead nowhere, everything in the folder of the table."""
    folder = path.parent
    inner: set[str] = set()
    for values in columns:
        count = sum(isinstance(value, str) for value in values)
        sample = list(islice(_strings(values), 0, None, max(1, count // 50)))
        if 2 * sum(_is_file(folder / text) for text in sample) > len(sample):
            inner.update(map(os.path.dirname, _strings(values)))
    return _list_folders(folder, inner) if inner else walk(folder)


def _strings(values: Iterable[Any]) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a null character
        return False


def _list_folders(folder: Path, inner: Iterable[str]) -> Tree:
    """List the images directly in some folders, which may be absolute or relative to `folder`."""
    top = os.path.abspath(folder)
    places = sorted({os.path.normpath(os.path.join(top, place)) for place in inner if "\0" not in place})
    places = [place for place in places if os.path.isdir(place)]
    root = os.path.commonpath([top, *places])
    entries: list[str] = []
    for place in places:
        start = os.path.relpath(place, root).replace(os.sep, "/")
        for name, size in _images_in(place):
            entries.append(image_entry(name if start == "." else f"{start}/{name}", size))
    images, sizes = sorted_images(entries)
    return Tree(root=Path(root), images=images, sizes=sizes)


def _images_in(folder: str) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the images in a folder; the size of a dangling link is -1.

    Raises:
        RequestError: If the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_image(entry.name) and not is_hidden(entry.name):
                    try:
                        status = entry.stat()
                    except OSError:
                        yield entry.name, -1
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        yield entry.name, status.st_size
    except OSError as error:
        raise RequestError(
            f"the folder {printable(folder)} cannot be read: {(error.strerror or '').lower()}"
        ) from error
