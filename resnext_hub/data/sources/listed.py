"""Images with a table of any name, such as `labels.csv`: found beside the images, or requested as the dataset itself.

Unlike `metadata.csv`, such a table has no fixed columns and perhaps no header: the column whose values are the names of
images contains the file names. They may lack folders or the suffix, as long as each matches one image.
"""

import logging
import os
import posixpath
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_hub.data.sources.folders import IMAGE_FOLDERS
from resnext_hub.data.sources.names import FILE_COLUMN, loose_role
from resnext_hub.data.sources.parquet import has_images, read_part
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.table_files import LABEL_TABLES, read_table, typed
from resnext_hub.data.sources.tables import (
    FILE_NAME,
    LABEL_NAMES,
    SPLIT,
    Table,
    finder,
    label_column_of,
    open_tables,
)
from resnext_hub.data.sources.walk import Tree, ignored, is_hidden, is_image, walk
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
        return _open(request, request.tree, request.listed)


class ImageFinder:
    """Finds the image of a row: by its path relative to the table, else by the end of the path, with or without suffix.

    Args:
        tree: The files of the dataset.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._exact = finder(tree)
        self._root = unicodedata.normalize("NFC", os.path.abspath(tree.root)).split("/")
        self._named: dict[str, list[int]] = defaultdict(list)
        self._folders: set[str] = set()
        self.count = len(tree.images)
        for index, path in enumerate(tree.images):
            *folders, name = unicodedata.normalize("NFC", path).split("/")
            self._folders.update(folders)
            inside = (*self._root, *folders)[-1]
            for key in (name, name.rpartition(".")[0]):
                self._named[key].append(index)
                self._named[f"{inside}/{key}"].append(index)

    def __call__(self, table: Table, name: str) -> int | None:
        """Return the index of the image, or None if there is none.

        Args:
            table: The table.
            name: The file name in it.

        Raises:
            RequestError: If several images match.
        """
        found = self.candidates(table, name)
        if len(found) > 1:
            paths = (self._tree.images[index] for index in found)
            raise RequestError(
                f"{printable(self._tree.root)}: the file name {printable(name)} of a table matches several images "
                f"({listing(paths, 3)}); write the path relative to the table"
            )
        return found[0] if found else None

    def candidates(self, table: Table, name: str) -> Sequence[int]:
        """Return the images that a file name could refer to, at most two; one if its path is exact.

        If there is a folder with the name of the table, such as train/ for train.csv, only images inside it match.
        """
        exact = self._exact(table, name)
        if exact is not None:
            return (exact,)
        path = unicodedata.normalize("NFC", name.replace("\\", "/")).strip("/")
        *folders, base = path.split("/")
        split = _split_of(table)
        within = split if split in self._folders else None
        alike = self._named.get(f"{folders[-1]}/{base}" if folders else base, ())
        return tuple(islice((index for index in alike if self._agrees(index, folders, within)), 2))

    def _agrees(self, index: int, folders: Sequence[str], within: str | None) -> bool:
        """Return whether an image is in the folders of a file name, and inside a folder if one is given."""
        own = unicodedata.normalize("NFC", self._tree.images[index]).split("/")[:-1]
        if within is not None and within not in own:
            return False
        return not folders or [*self._root, *own][-len(folders) :] == list(folders)


def find_listed(tree: Tree, requested: str | None) -> list[Table]:
    """Return the table that lists the images of a folder without class folders, or those of its splits.

    Args:
        tree: The files of the dataset.
        requested: The requested label column.

    Raises:
        RequestError: If several tables list images and are not those of splits, or the only table cannot be read.
    """
    if not tree.images or not _without_classes(tree):
        return []
    wanted = {SPLIT, *LABEL_NAMES, requested or SPLIT}
    find, found, errors = ImageFinder(tree), list[Table](), list[RequestError]()
    for path in tree.others:
        if path.lower().endswith(LABEL_TABLES):
            try:
                columns, skipped = read_table(tree.root / path, wanted, len(tree.images))
            except RequestError as error:
                if _split_of(Table(path, {})):
                    raise
                errors.append(error)
                continue
            read = Table(path, columns, tuple(skipped))
            table = _as_listed(read, find, needed=0.0 if _split_of(read) else 0.5)
            if table is not None and len(table.columns) > 1:
                found.append(table)
    if not found and errors:
        raise errors[0]
    for failure in errors:
        _logger.warning("ignored a table: %s", failure)
    splits = [_split_of(table) for table in found]
    if len(found) < 2 or not all(splits) or len(set(splits)) < len(splits):
        _require_one(tree, found)
        return found
    return [
        replace(table, columns=table.columns | {SPLIT: [split] * table.rows})
        for table, split in zip(found, splits, strict=True)
    ]


def _open(request: "Request", tree: Tree, tables: list[Table]) -> OpenDataset:
    request.require_no_streaming()
    label_column = label_column_of(tree, tables, request.config.label_column, classless=True)
    assert label_column is not None
    opened = open_tables(tree, tables, label_column, request.config.eval_split, ImageFinder(tree))
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

    folders = {posixpath.dirname(path) for path in tree.images}
    return len({tuple(filter(could_be_class, folder.split("/"))) for folder in folders}) == 1


def _split_of(table: Table) -> str | None:
    """Return the split that the name of a table states, such as train.csv."""
    name = posixpath.basename(table.path).rpartition(".")[0]
    return name if loose_role(name) else None


def _requested(path: Path, label_column: str | None) -> tuple[Tree, list[Table]]:
    """Return the images around a requested table, and the table.

    Raises:
        RequestError: If none of its columns contains names of images.
    """
    columns, skipped = read_table(path, {SPLIT, *LABEL_NAMES, label_column or SPLIT})
    tree = _images_around(path, columns.values())
    name = os.path.relpath(path.absolute(), tree.root.absolute()).replace(os.sep, "/")
    table = _as_listed(Table(name, columns, tuple(skipped)), ImageFinder(tree), needed=0.0)
    if table is None:
        texts = (str(value) for values in columns.values() for value in values[:1] if isinstance(value, str))
        example = next(filter(is_image, texts), None)
        raise RequestError(
            f"{printable(path)}: none of the images that it lists exists, such as {printable(example)}; expected paths "
            "relative to the table"
            if example
            else f"{printable(path)} has no column of images, or of the names of images in {printable(path.parent)}; "
            f"its columns: {listing(columns)}"
        )
    return tree, [table]


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
        rows = [typed([str(name), *_as_text(values)]) for name, values in table.columns.items()]
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
                f"the columns {printable(likely[0])} and {printable(other)} of {printable(table.path)} have the names "
                "of different images; keep one of them"
            )
    return likely[0] if likely else None


def _as_text(values: Iterable[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]


def _images_around(path: Path, columns: Iterable[Sequence[Any]]) -> Tree:
    """List the folders that a table refers to; if most paths lead nowhere, everything in the folder of the table."""
    folder = path.parent
    inner: set[str] = set()
    for values in columns:
        texts = [value for value in values if isinstance(value, str)]
        sample = texts[:: max(1, len(texts) // 50)]
        if 2 * sum(_is_file(folder / text) for text in sample) > len(sample):
            inner |= {os.path.dirname(text) for text in texts}
    return _list_folders(folder, inner) if inner else walk(folder)


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
    found: list[tuple[str, int]] = []
    for place in places:
        start = os.path.relpath(place, root).replace(os.sep, "/")
        for name, size in _images_in(place):
            found.append((name if start == "." else f"{start}/{name}", size))
    found.sort(key=lambda entry: entry[0].split("/"))
    return Tree(root=Path(root), images=[name for name, _ in found], sizes=[size for _, size in found])


def _images_in(folder: str) -> list[tuple[str, int]]:
    """Return names and sizes of the images in a folder; the size of a dangling link is -1.

    Raises:
        RequestError: If the folder cannot be read.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_image(entry.name) and not is_hidden(entry.name):
                    try:
                        status = entry.stat()
                    except OSError:
                        found.append((entry.name, -1))
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        found.append((entry.name, status.st_size))
    except OSError as error:
        raise RequestError(
            f"the folder {printable(folder)} cannot be read: {(error.strerror or '').lower()}"
        ) from error
    return found
