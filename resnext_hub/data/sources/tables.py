"""Images with a table of their labels: `metadata.csv`, `.tsv`, `.jsonl` or `.parquet`, as the library datasets has it.

Each row names a file as seen from the table, in the column `file_name`, and holds its label. A column called `split`,
or one that holds names of splits alone, says the split of each row.
"""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from resnext_hub.data.sources.folders import image_table
from resnext_hub.data.sources.names import EVAL_NAMES, TRAIN_NAMES, likely_splits, loose_role, split_role
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.table_files import Columns, read_table
from resnext_hub.data.sources.walk import Tree, ignored
from resnext_hub.errors import RequestError, one_line
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    from resnext_hub.data.sources.request import Request

FILE_NAME = "file_name"
SPLIT = "split"
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
"""Columns of labels, by name in any case, the one to prefer first."""


class MetadataTables:
    """Images with tables of their labels."""

    def matches(self, request: "Request") -> bool:
        """Return whether there are metadata files with a column of labels."""
        return request.label_column is not None

    def open(self, request: "Request") -> OpenDataset:
        """Open the images that the tables name."""
        request.require_no_streaming()
        assert request.label_column is not None
        opened = open_tables(request.tree, request.tables, request.label_column, request.config.eval_split)
        return opened.with_notes(ignored(request.tree, [table.path for table in request.tables]))


@dataclass(frozen=True)
class Table:
    """The columns of a metadata file."""

    path: str
    columns: Columns
    passed: tuple[str, ...] = ()
    """Columns that were not read, as there are so many."""

    @property
    def folder(self) -> str:
        """Folder that its file names are relative to."""
        return posixpath.dirname(self.path)


def find_tables(tree: Tree, asked: str | None) -> list[Table]:
    """Read the metadata files of a folder that have a column `file_name`.

    Args:
        tree: The files.
        asked: Column of labels that is asked for.

    Raises:
        RequestError: If one of them cannot be read.
    """
    found = []
    for path in tree.others:
        if re.fullmatch(r"metadata\.(csv|tsv|jsonl|parquet)", posixpath.basename(path), re.IGNORECASE):
            columns, passed = read_table(tree, path, {FILE_NAME, SPLIT, *LABEL_NAMES, asked or SPLIT})
            spelled = [name for name in columns if name.casefold() == FILE_NAME]
            if len(spelled) == 1:
                columns = {FILE_NAME if name == spelled[0] else name: column for name, column in columns.items()}
            if FILE_NAME in columns:
                found.append(Table(path, columns, tuple(passed)))
    return found


def label_column_of(tree: Tree, tables: Sequence[Table], asked: str | None) -> str | None:
    """Return the column of labels, or None if the tables hold none and folders can say the classes.

    Without being asked for, it is one that is called like labels; or the only one, where folders say no class.

    Raises:
        RequestError: If the one that is asked for is not there or holds no labels, if two could be meant, or if none is
            found where images lie directly beside a table, so that no folder says their class.
    """
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    splits = [name for name in columns if _holds_splits(tables, name)]
    if asked in columns and (asked == FILE_NAME or asked.casefold() == SPLIT):
        what = "file names" if asked == FILE_NAME else "splits"
        others = [name for name in columns if name not in (FILE_NAME, *splits)]
        raise RequestError(
            f"--label-column {printable(asked)}: that column of {printable(tree.root / tables[0].path)} holds {what}; "
            f"expected a column of classes ({listing(others) or 'it has no other'})"
        )
    if asked in columns:
        return asked
    known = _called_like_labels(columns)
    if known and asked is None:
        for table in tables:
            _refuse_other_classes(tree, table)
        return known[0]
    folders = {posixpath.dirname(path) for path in tree.images}
    if asked is None and not folders & {table.folder for table in tables}:
        return None
    others = [name for name in columns if name not in (FILE_NAME, *splits)]
    classless = len(folders) == 1 or all(map(_split_folder, tree.images))
    if len(others) == 1 and asked is None and classless:
        return others[0]
    what = f"--label-column {printable(asked)}: there is no such column" if asked else "no column is called label"
    way = "" if classless else ", or take the folders as classes with --layout classes"
    raise RequestError(
        f"{printable(tree.root / tables[0].path)}: {what}; it has {listing(columns)}: name one with --label-column{way}"
    )


def _refuse_other_classes(tree: Tree, table: Table) -> None:
    """Refuse several columns called like labels, unless each label of one stands for one of the other."""
    names = _called_like_labels(table.columns)
    for other in names[1:]:
        pairs = {(str(a), str(b)) for a, b in zip(table.columns[names[0]], table.columns[other], strict=True)}
        if len(pairs) > min((len(set(part)) for part in zip(*pairs, strict=True)), default=0):
            raise RequestError(
                f"{printable(tree.root / table.path)} has the columns {printable(names[0])} and {printable(other)}, "
                "which sort the images in two ways; name one with --label-column"
            )


def _called_like_labels(columns: Iterable[str]) -> list[str]:
    """Return the columns that are called like labels, the one to prefer first."""
    return [column for name in LABEL_NAMES for column in columns if column.casefold() == name]


def _holds_splits(tables: Sequence[Table], name: str) -> bool:
    """Return whether a column is called `split`, or holds names of splits alone and is not called like labels."""
    if name.casefold() in (SPLIT, *LABEL_NAMES):
        return name.casefold() == SPLIT
    values = {str(value) for table in tables for value in table.columns.get(name, ()) if value is not None}
    return bool(values) and (
        all(map(split_role, values)) or {loose_role(value) for value in values} == {"train", "eval"}
    )


def open_tables(tree: Tree, tables: Sequence[Table], label_column: str, eval_split: str | None = None) -> OpenDataset:
    """Open images whose labels stand in tables; splits come from a column of splits, or from the folders of the files.

    Tables without labels, as of a test split, are left out.

    Args:
        tree: The files.
        tables: What `find_tables` found.
        label_column: Column of labels.
        eval_split: Split to evaluate on, if it is asked for.

    Raises:
        RequestError: If no row has a file, or a file has two labels or two splits.
    """
    _require_one_label_column(tree, tables, label_column)
    find = _finder(tree)
    labels: dict[int, Any] = {}
    splits: dict[int, str] = {}
    missing: list[str] = []
    tables = [table for table in tables if label_column in table.columns]
    split_column = _split_column_of(tree, tables, label_column)
    for table in tables:
        count = len(table.columns[FILE_NAME])
        wanted = table.columns.get(split_column or "", [None] * count)
        for name, label, split in zip(table.columns[FILE_NAME], table.columns[label_column], wanted, strict=True):
            place = find(table.folder, str(name))
            if place is None:
                missing.append(str(name))
                continue
            first = labels.setdefault(place, label)
            if first is not label and first != label:  # a NaN differs from itself
                _refuse_two(tree, table, name, "labels", first, label)
            stated = "" if split is None else str(split).strip()
            if stated and splits.setdefault(place, stated) != stated:
                _refuse_two(tree, table, name, "splits", splits[place], stated)
    where = printable(tree.root / tables[0].path)
    if not labels:
        example = f" (the first is {printable(missing[0])})" if missing else ""
        raise RequestError(
            f"{where} names no image that is there{example}; {FILE_NAME} is the path as seen from the table"
        )
    notes = [f"labels from column {printable(label_column)} of {listing(table.path for table in tables)}"]
    if split_column:
        notes.append(f"splits from column {printable(split_column)}")
    used = {FILE_NAME, label_column, split_column}
    unused = dict.fromkeys(name for table in tables for name in (*table.columns, *table.passed) if name not in used)
    if unused:
        notes.append(f"columns not used: {listing(unused)}")
    unnamed = [path for i, path in enumerate(tree.images) if i not in labels]
    if missing:
        notes.append(f"{len(missing)} rows without a file left out, such as {printable(missing[0])}")
    if unnamed:
        notes.append(f"{len(unnamed)} images without a row left out, such as {printable(unnamed[0])}")
    roles = [{_role_of(path) for path in part} for part in ((tree.images[i] for i in labels), unnamed)]
    if "train" in roles[1] - roles[0] and "eval" in roles[0]:
        raise RequestError(
            f"{where} has the labels of an evaluation split, and the training split has no table; give it a "
            f"metadata.csv, too, or move {printable(tables[0].path)} away"
        )
    if split_column and splits:
        splits = _require_all(tree, splits, labels, f"{where}: the column {printable(split_column)}")
        _require_evaluation(sorted(set(splits.values())), where, eval_split)
    else:
        splits = _splits_of(tree, labels, where)
    return OpenDataset(
        tables={
            split: _image_table(tree, [i for i in sorted(labels) if splits[i] == split], label_column, labels, where)
            for split in sorted(set(splits.values()))
        },
        files=tuple((tree.images[i], tree.sizes[i]) for i in sorted(labels)),
        roots=None,
        notes=tuple(notes),
    )


def _refuse_two(tree: Tree, table: Table, name: Any, what: str, first: Any, second: Any) -> NoReturn:
    raise RequestError(
        f"{printable(tree.root / table.path)} gives {printable(name)} two {what}, {printable(first)} and "
        f"{printable(second)}; expected one row per file"
    )


def _split_column_of(tree: Tree, tables: Sequence[Table], label_column: str) -> str | None:
    """Return the column of splits, or None.

    Raises:
        RequestError: If several differ, or a column says only by its name which split a row belongs to.
    """
    columns = dict.fromkeys(name for table in tables for name in table.columns if name not in (FILE_NAME, label_column))
    found = [name for name in columns if _holds_splits(tables, name)]
    where = printable(tree.root / tables[0].path)
    if any(table.columns.get(found[0]) != table.columns.get(other) for other in found[1:] for table in tables):
        raise RequestError(f"{where} has splits in several columns that differ ({listing(found)}); remove all but one")
    if found:
        return found[0]
    names = "|".join((*TRAIN_NAMES, *EVAL_NAMES))
    named = next((name for name in columns if re.match(rf"is[_ -]?({names})", name, re.IGNORECASE)), None)
    if named:
        raise RequestError(
            f"{where} has a column {printable(named)}, which is not read: name the split of each row in a column split "
            "(train, val or test), or remove the column"
        )
    return None


def _require_evaluation(names: Sequence[str], where: str, asked: str | None) -> None:
    """Refuse splits beside the training split of which none is called like one to evaluate on."""
    others = [name for name in names if name not in likely_splits(names, "train")]
    if asked is None and 0 < len(others) < len(names) and not likely_splits(names, "eval"):
        raise RequestError(
            f"{where} has the splits {listing(names)}, none of which is called like one to evaluate on (val, test …); "
            f"name one with --eval-split, such as --eval-split {printable(others[0])}"
        )


def _require_one_label_column(tree: Tree, tables: Sequence[Table], label_column: str) -> None:
    """Refuse tables whose labels stand in columns of different names: those of one would be left out."""
    for table in tables:
        other = next(iter(_called_like_labels(table.columns)), None)
        if label_column not in table.columns and other:
            raise RequestError(
                f"{printable(tree.root / table.path)} has a column {other} where another table has "
                f"{printable(label_column)}; call the column of labels alike in all tables"
            )


_ODD_PATH = re.compile(r"[^\x20-\x7e]|\\|//|(?:^|/)\.{1,2}(?:/|$)|^/|/$")
"""Paths that could name a file although they are not spelled like its own."""


def _finder(tree: Tree) -> Callable[[str, str], int | None]:
    """Return what finds the image that a row of a table in a folder names, or None.

    Paths may be absolute, have backslashes, or spell characters in another way of Unicode than the file does.
    """
    exact = {path: i for i, path in enumerate(tree.images)}
    alike: dict[str, int | None] = {}
    for path, i in exact.items():
        if not path.isascii():
            normal = unicodedata.normalize("NFC", path)
            alike[normal] = None if normal in alike else i
    roots = [os.path.join(folder, "") for folder in (os.path.abspath(tree.root), os.path.realpath(tree.root))]

    def find(folder: str, name: str) -> int | None:
        place = exact.get(f"{folder}/{name}" if folder else name)
        if place is not None or not _ODD_PATH.search(name):
            return place
        for written in (name, name.replace("\\", "/")):
            path = posixpath.normpath(posixpath.join(folder, written))
            for root in roots:
                path = path.removeprefix(root)
            place = exact.get(path, alike.get(unicodedata.normalize("NFC", path)))
            if place is not None:
                return place
        return None

    return find


def _require_all(tree: Tree, splits: dict[int, str], labels: dict[int, Any], where: str) -> dict[int, str]:
    """Return splits that a column states, if it does so for each image, and spells each split in one way.

    Raises:
        RequestError: If not.
    """
    without = [i for i in labels if i not in splits]
    if without:
        raise RequestError(
            f"{where} is empty for {len(without)} of {len(labels)} images, such as "
            f"{printable(tree.images[without[0]])}; fill it in, or remove the column"
        )
    names = sorted(set(splits.values()))
    if len({name.casefold() for name in names}) < len(names):
        raise RequestError(
            f"{where} has {listing(names)}, some of which differ in upper case alone; spell each split in one way"
        )
    return splits


def _splits_of(tree: Tree, labels: dict[int, Any], where: str) -> dict[int, str]:
    """Return the split of each image: the topmost of its folders that is called like one.

    Folders that only mention a split, as training_set/ and test_set/ do, are splits if they share a label:
    bullet_train/ and test_tube/ could be classes.
    """
    found = {i: _split_folder(tree.images[i]) for i in sorted(labels)}
    names = {split for split in found.values() if split is not None}
    inside = {
        role: {str(labels[i]) for i, split in found.items() if split and loose_role(split) == role}
        for role in ("train", "eval")
    }
    exact = {split_role(name) for name in names} >= {"train", "eval"}
    if not all(inside.values()) or not (exact or inside["train"] & inside["eval"]):
        return dict.fromkeys(found, "train")
    outside = [tree.images[i] for i, split in found.items() if split is None]
    if outside:
        raise RequestError(
            f"{where} names images of the splits {listing(sorted(names))} and {len(outside)} images of none, such as "
            f"{printable(outside[0])}; add a column split"
        )
    return {i: str(split) for i, split in found.items()}


def _split_folder(path: str) -> str | None:
    folders = path.split("/")[:-1]
    return next(filter(split_role, folders), None) or next(filter(loose_role, folders), None)


def _role_of(path: str) -> str | None:
    folder = _split_folder(path)
    return loose_role(folder) if folder else None


def _image_table(tree: Tree, images: Sequence[int], column: str, labels: dict[int, Any], where: str) -> Any:
    import datasets
    import pyarrow

    try:
        values = pyarrow.array([labels[i] for i in images])
        feature = datasets.features.features.generate_from_arrow_type(values.type)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise RequestError(
            f"{where}: column {printable(column)} holds values of several kinds ({one_line(error)}); expected numbers "
            "of classes or their names"
        ) from error
    return image_table(tree, images, column, values, feature)
