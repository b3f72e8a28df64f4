"""Images with a table of labels: `metadata.csv`, `.tsv`, `.jsonl` or `.parquet`, as in the ImageFolder of datasets.

Each row has the path of an image relative to the table, in the column `file_name`, and its label. The split of each row
is in a column called `split`, or in one that contains only names of splits.
"""

import posixpath
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, NoReturn

from resnext_hub.data.sources.finders import Find, finder
from resnext_hub.data.sources.flags import split_columns
from resnext_hub.data.sources.folders import image_table
from resnext_hub.data.sources.names import (
    LABEL_NAMES,
    likely_splits,
    loose_role,
    split_folder,
    split_role,
)
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.table_columns import (
    FILE_NAME,
    SPLIT,
    Table,
    combined,
    require_one_label_column,
    split_column_of,
)
from resnext_hub.data.sources.table_files import read_table
from resnext_hub.data.sources.texts import Files
from resnext_hub.data.sources.walk import Tree, ignored
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    from resnext_hub.data.sources.request import Request


class MetadataTables:
    """Images with tables of labels."""

    def matches(self, request: "Request") -> bool:
        """Return whether there are metadata files with a label column."""
        return request.label_column is not None

    def open(self, request: "Request") -> OpenDataset:
        """Open the images in the tables."""
        request.require_no_streaming()
        assert request.label_column is not None
        opened = open_tables(request.tree, request.tables, request.label_column, request.config.eval_split)
        return opened.with_notes(ignored(request.tree, [table.path for table in request.tables]))


def find_tables(tree: Tree, requested: str | None) -> list[Table]:
    """Read the metadata files of a folder that have a column `file_name`.

    Args:
        tree: The files of the dataset.
        requested: The requested label column.

    Raises:
        RequestError: If one of them cannot be read.
    """
    found = []
    for path in tree.others:
        if re.fullmatch(r"metadata\.(csv|tsv|jsonl|parquet)", posixpath.basename(path), re.IGNORECASE):
            columns, skipped = read_table(
                tree.root / path, {FILE_NAME, SPLIT, *LABEL_NAMES, requested or SPLIT}, len(tree.images)
            )
            spelled = [name for name in columns if name.casefold() == FILE_NAME]
            if len(spelled) == 1:
                columns = {FILE_NAME if name == spelled[0] else name: column for name, column in columns.items()}
            if FILE_NAME in columns:
                found.append(Table(path, columns, tuple(skipped)))
    return found


def open_tables(
    tree: Tree, tables: Sequence[Table], label_column: str, eval_split: str | None = None, find: Find | None = None
) -> OpenDataset:
    """Open images with labels from tables; splits come from a split column, or from the folders of the files.

    Tables without labels, such as that of a test split, are ignored.

    Args:
        tree: The files of the dataset.
        tables: The tables from `find_tables`.
        label_column: The label column.
        eval_split: The requested evaluation split.
        find: Finds the image of a row; only by its path if not given.

    Raises:
        RequestError: If no row has a file, or a file has two labels or two splits.
    """
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    several = split_columns(label_column, columns)
    tables = [combined(table, several) for table in tables]
    require_one_label_column(tree, tables, label_column)
    tables = [table for table in tables if label_column in table.columns]
    split_column = split_column_of(tree, tables, label_column)
    rows = _match(tree, tables, label_column, split_column, find or finder(tree))
    where = printable(tree.root / tables[0].path)
    if not rows.images:
        example = f", for example {printable(rows.example)}" if rows.missing else ""
        raise RequestError(
            f"none of the files listed in {where} exists{example}; expected {FILE_NAME} to be a path relative to the "
            "table"
        )
    what = f"columns {listing(several)}" if len(several) > 1 else f"column {printable(label_column)}"
    notes = [f"labels from {what} of {listing(table.path for table in tables)}"]
    if split_column:
        notes.append(f"splits from column {printable(split_column)}")
    used = {FILE_NAME, label_column, split_column}
    unused = dict.fromkeys(name for table in tables for name in (*table.columns, *table.skipped) if name not in used)
    if unused:
        notes.append(f"unused columns: {listing(unused)}")
    unlabelled = [path for path, label in zip(tree.images, rows.labels, strict=True) if label is _NO_ROW]
    if rows.missing:
        notes.append(f"ignored {rows.missing} rows whose file does not exist, such as {printable(rows.example)}")
    if unlabelled:
        notes.append(f"ignored {len(unlabelled)} images without a row, such as {printable(unlabelled[0])}")
    roles = [{_role_of(path) for path in part} for part in ((tree.images[i] for i in rows.images), unlabelled)]
    if "train" in roles[1] - roles[0] and "eval" in roles[0]:
        raise RequestError(
            f"{where} labels only an evaluation split, so the training split has no labels; add a metadata.csv for "
            f"the training split, or move {printable(tables[0].path)} elsewhere"
        )
    if split_column and any(rows.splits):
        splits = _require_all(tree, rows, f"the column {printable(split_column)} of {where}")
        _require_evaluation(sorted(set(splits)), where, eval_split)
    else:
        splits = _splits_of(tree, rows, where)
    parts = {split: array("q", compress(rows.images, map(split.__eq__, splits))) for split in sorted(set(splits))}
    tables_of_splits = {
        split: _image_table(tree, part, label_column, several, rows.labels, where) for split, part in parts.items()
    }
    return OpenDataset(
        tables=tables_of_splits,
        files=Files(tree.images, tree.sizes, rows.images),
        roots=None,
        notes=tuple(notes),
    )


_NO_ROW = object()
"""In place of the label of an image without a row."""


@dataclass
class _Rows:
    """What the rows of tables state about the images."""

    labels: list[Any]
    """Label of each image of the dataset, or `_NO_ROW`."""
    splits: list[str]
    """Split of each image according to a column; empty if there is none."""
    missing: int = 0
    """Number of rows without an image."""
    example: str = ""
    """The file name of the first of them."""

    @cached_property
    def images(self) -> Sequence[int]:
        """Indices of the images that have a row."""
        return array("q", (i for i, label in enumerate(self.labels) if label is not _NO_ROW))


def _match(tree: Tree, tables: Sequence[Table], label_column: str, split_column: str | None, find: Find) -> _Rows:
    """Return the label and the split of each image.

    Raises:
        RequestError: If an image has two labels or two splits.
    """
    found = _Rows([_NO_ROW] * len(tree.images), [""] * len(tree.images))
    for table in tables:
        wanted = table.columns.get(split_column or "", [None] * table.rows)
        for name, label, split in zip(table.columns[FILE_NAME], table.columns[label_column], wanted, strict=True):
            place = find(table, str(name))
            if place is None:
                found.example = found.example if found.missing else str(name)
                found.missing += 1
                continue
            first = found.labels[place]
            if first is _NO_ROW:
                found.labels[place] = label
            elif first is not label and first != label:  # a NaN differs from itself
                _reject_two(tree, table, name, "labels", first, label)
            stated = "" if split is None else str(split).strip()
            if stated and found.splits[place] not in ("", stated):
                _reject_two(tree, table, name, "splits", found.splits[place], stated)
            found.splits[place] = stated or found.splits[place]
    return found


def _reject_two(tree: Tree, table: Table, name: Any, what: str, first: Any, second: Any) -> NoReturn:
    raise RequestError(
        f"{printable(name)} has two {what} in {printable(tree.root / table.path)}, {printable(first)} and "
        f"{printable(second)}; expected one row per file"
    )


def _require_evaluation(names: Sequence[str], where: str, requested: str | None) -> None:
    """Raise RequestError if there are other splits than the training split, but none named like an evaluation split."""
    others = [name for name in names if name not in likely_splits(names, "train")]
    if requested is None and 0 < len(others) < len(names) and not likely_splits(names, "eval"):
        raise RequestError(
            f"{where} has the splits {listing(names)}, but none of them has a usual name for an evaluation split "
            f"(val, test …); choose one, such as {setting('eval_split', others[0])}"
        )


def _require_all(tree: Tree, rows: _Rows, where: str) -> list[str]:
    """Return the split of each image with a row after checking the column of splits.

    Raises:
        RequestError: If the column is empty for some images, or the names of splits differ only in case.
    """
    without = [i for i in rows.images if not rows.splits[i]]
    if without:
        raise RequestError(
            f"{where} is empty for {len(without)} of {len(rows.images)} images, such as "
            f"{printable(tree.images[without[0]])}; fill in the missing values, or remove the column"
        )
    splits = [rows.splits[i] for i in rows.images]
    names = sorted(set(splits))
    if len({name.casefold() for name in names}) < len(names):
        raise RequestError(
            f"{where} has the splits {listing(names)}, some of which differ only in case; use one spelling for each"
        )
    return splits


def _splits_of(tree: Tree, rows: _Rows, where: str) -> list[str]:
    """Return the split of each image with a row: the topmost of its folders that is named like one.

    Folders that only contain the name of a split, such as training_set/ and test_set/, are splits if they have a label
    in common; bullet_train/ and test_tube/ could be classes.
    """
    found = [split_folder(tree.images[i]) for i in rows.images]
    names = {split for split in found if split is not None}
    inside: dict[str | None, set[str]] = {"train": set(), "eval": set()}
    for i, split in zip(rows.images, found, strict=True):
        if split:
            inside[loose_role(split)].add(str(rows.labels[i]))
    exact = {split_role(name) for name in names} >= {"train", "eval"}
    if not all(inside.values()) or not (exact or inside["train"] & inside["eval"]):
        return ["train"] * len(found)
    outside = [tree.images[i] for i, split in zip(rows.images, found, strict=True) if split is None]
    if outside:
        raise RequestError(
            f"{where} labels {len(outside)} images outside the split folders ({listing(sorted(names))}), such as "
            f"{printable(outside[0])}; add a column named split"
        )
    return [str(split) for split in found]


def _role_of(path: str) -> str | None:
    folder = split_folder(path)
    return loose_role(folder) if folder else None


def _image_table(
    tree: Tree, images: Sequence[int], column: str, names: Sequence[str], labels: Sequence[Any], where: str
) -> Any:
    import datasets
    import pyarrow

    try:
        if len(names) > 1:
            feature = datasets.List(datasets.ClassLabel(names=names))
            values = pyarrow.array([labels[i] for i in images], pyarrow.list_(pyarrow.int64()))
        else:
            values = pyarrow.array([labels[i] for i in images])
            feature = datasets.features.features.generate_from_arrow_type(values.type)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise RequestError(
            f"column {printable(column)} of {where} contains values of several types ({one_line(error)}); expected "
            "either class names or class numbers"
        ) from error
    return image_table(tree, images, column, values, feature)
