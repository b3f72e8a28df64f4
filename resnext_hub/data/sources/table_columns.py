"""Find the columns of tables of images: file names, labels and splits."""

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from resnext_hub.data.sources.flags import as_flag, flag_columns, holds_flags, join_columns, repeats, split_columns
from resnext_hub.data.sources.names import (
    LABEL_NAMES,
    loose_role,
    names_split,
    split_folder,
    split_role,
)
from resnext_hub.data.sources.table_files import Columns
from resnext_hub.data.sources.walk import Tree
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable

FILE_NAME = "file_name"
SPLIT = "split"


@dataclass(frozen=True)
class Table:
    """The columns of a metadata file."""

    path: str
    columns: Columns
    skipped: tuple[str, ...] = ()
    """Columns that were not read, because there are too many."""

    @property
    def folder(self) -> str:
        """The folder that its file names are relative to."""
        return posixpath.dirname(self.path)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.columns[FILE_NAME])


def label_column_of(tree: Tree, tables: Sequence[Table], requested: str | None, classless: bool = False) -> str | None:
    """Return the label column, or None if the tables have none and folders can define the classes.

    Unless one is requested, it is the one with a usual name, or the only column if folders cannot define the classes.

    Args:
        tree: The files of the dataset.
        tables: Its tables, with their file names in `file_name`.
        requested: The requested label column.
        classless: Whether it is known that folders cannot define the classes.

    Raises:
        RequestError: If the requested one does not exist or does not hold labels, if it is ambiguous, or if there is
            none although images are in the folder of a table, so no class folder defines their class.
    """
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    splits = [name for name in columns if _holds_splits(tables, name)]
    if requested in columns and (requested == FILE_NAME or requested.casefold() == SPLIT):
        what = "file names" if requested == FILE_NAME else "splits"
        others = [name for name in columns if name not in (FILE_NAME, *splits)]
        raise RequestError(
            f"{setting('label_column', requested)}: this column of {printable(tree.root / tables[0].path)} contains "
            f"{what}; expected a column of classes (other columns: {listing(others) or 'none'})"
        )
    if requested in columns:
        return requested
    several = split_columns(requested, columns) if requested else []
    if len(several) > 1:
        _require_flags(tree, tables, several)
        return join_columns(several)
    known = called_like_labels(columns)
    if known and requested is None:
        for table in tables:
            _reject_other_classes(tree, table)
        return known[0]
    folders = tree.image_folders
    classless = classless or len(folders) == 1 or all(map(split_folder, tree.images))
    if requested is None and not classless and not folders & {table.folder for table in tables}:
        return None
    others = _plain_or_lists(tables, [name for name in columns if name not in (FILE_NAME, *splits)])
    if len(others) == 1 and requested is None and classless:
        return others[0]
    values = {name: _chained(tables, name) for name in others if not names_split(name)}
    flags = flag_columns(values) if requested is None else []
    if flags:
        return join_columns(flags)
    where = printable(tree.root / tables[0].path)
    what = (
        f"{setting('label_column', requested)}: {where} has no such column"
        if requested
        else f"{where} has no column named label"
    )
    remedy = "" if classless else f", or use the folders as classes with {setting('layout', 'classes')}"
    raise RequestError(f"{what}; its columns: {listing(columns)}; choose one with {setting('label_column')}{remedy}")


def _plain_or_lists(tables: Sequence[Table], names: Sequence[str]) -> list[str]:
    """Return the columns without lists, or those of lists if the others only number or name the rows."""
    lists = [name for name in names if any(isinstance(value, list) for value in islice(_chained(tables, name), 1000))]
    plain = [name for name in names if name not in lists]
    if not lists:
        return plain
    return [name for name in plain if repeats(_chained(tables, name))] or lists


def _chained(tables: Sequence[Table], name: str) -> Iterable[Any]:
    """Return the values of a column in all tables."""
    return (value for table in tables for value in table.columns.get(name, ()))


def _require_flags(tree: Tree, tables: Sequence[Table], names: Sequence[str]) -> None:
    """Raise RequestError unless columns that are labels together hold 0 and 1 only."""
    for name in names:
        if not holds_flags(_chained(tables, name)):
            odd = next((value for value in _chained(tables, name) if as_flag(value) is None), None)
            raise RequestError(
                f"{setting('label_column', join_columns(names))}: column {printable(name)} of "
                f"{printable(tree.root / tables[0].path)} contains {printable(odd)}; several label columns must "
                "contain only 0 and 1"
            )


def combined(table: Table, names: Sequence[str]) -> Table:
    """Return a table with its columns of 0 and 1 replaced by one with a list of the labels of each image.

    Args:
        table: The table.
        names: Its label columns; a single one changes nothing, and neither does a table without them.
    """
    if len(names) < 2 or not set(names) <= table.columns.keys():
        return table
    kept = {name: values for name, values in table.columns.items() if name not in names}
    found: dict[tuple[object, ...], list[int]] = {}  # images with the same labels share a list
    labels = []
    for row in zip(*(table.columns[name] for name in names), strict=True):
        if row not in found:
            found[row] = [i for i, value in enumerate(row) if as_flag(value)]
        labels.append(found[row])
    return replace(table, columns=kept | {join_columns(names): labels})


def _reject_other_classes(tree: Tree, table: Table) -> None:
    """Raise RequestError if several columns named like labels define different classes."""
    names = called_like_labels(table.columns)
    for other in names[1:]:
        pairs = {(str(a), str(b)) for a, b in zip(table.columns[names[0]], table.columns[other], strict=True)}
        if len(pairs) > min((len(set(part)) for part in zip(*pairs, strict=True)), default=0):
            raise RequestError(
                f"{printable(tree.root / table.path)} has the columns {printable(names[0])} and {printable(other)}, "
                f"which define different classes; choose one with {setting('label_column')}"
            )


def called_like_labels(columns: Iterable[str]) -> list[str]:
    """Return the columns named like labels, in order of preference."""
    return [column for name in LABEL_NAMES for column in columns if column.casefold() == name]


def _holds_splits(tables: Sequence[Table], name: str) -> bool:
    """Return whether a column is called `split`, or contains only names of splits and is not named like labels."""
    if name.casefold() in (SPLIT, *LABEL_NAMES):
        return name.casefold() == SPLIT
    names: set[str] = set()
    for value in (value for table in tables for value in table.columns.get(name, ()) if value is not None):
        if str(value) not in names:
            if not split_role(str(value)) and not loose_role(str(value)):
                return False  # early, because most columns have other values, perhaps a million of them
            names.add(str(value))
    return bool(names) and (all(map(split_role, names)) or {loose_role(value) for value in names} == {"train", "eval"})


def split_column_of(tree: Tree, tables: Sequence[Table], label_column: str) -> str | None:
    """Return the split column, or None.

    Raises:
        RequestError: If several differ, or a column such as `is_valid` encodes a split in its name.
    """
    columns = dict.fromkeys(name for table in tables for name in table.columns if name not in (FILE_NAME, label_column))
    found = [name for name in columns if _holds_splits(tables, name)]
    where = printable(tree.root / tables[0].path)
    if any(table.columns.get(found[0]) != table.columns.get(other) for other in found[1:] for table in tables):
        raise RequestError(f"{where} has several split columns that differ ({listing(found)}); remove all but one")
    if found:
        return found[0]
    named = next(filter(names_split, columns), None)
    if named:
        raise RequestError(
            f"{where} has a column {printable(named)}, which is not supported; replace it with a column named split "
            "(values: train, val or test), or remove it"
        )
    return None


def require_one_label_column(tree: Tree, tables: Sequence[Table], label_column: str) -> None:
    """Raise RequestError if the label columns of tables have different names, since one would be ignored."""
    for table in tables:
        other = next(iter(called_like_labels(table.columns)), None)
        if label_column not in table.columns and other:
            raise RequestError(
                f"{printable(tree.root / table.path)} has its labels in column {printable(other)}, but another table "
                f"has them in {printable(label_column)}; use the same column name in all tables"
            )
