"""Images with a table of their labels: `metadata.csv`, `.jsonl` or `.parquet`, as the library datasets has it.

Each row names a file as seen from the table, in the column `file_name`, and holds its label.
"""

import csv
import io
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resnext_hub.data.sources.folders import image_table
from resnext_hub.data.sources.names import split_role
from resnext_hub.data.sources.source import Source
from resnext_hub.data.sources.walk import Tree
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import read_regular
from resnext_hub.text import listing, printable

FILE_NAME = "file_name"
SPLIT = "split"
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
"""Columns of labels, by name, the one to prefer first."""


@dataclass(frozen=True)
class Table:
    """The columns of a metadata file."""

    path: str
    columns: dict[str, list[Any]]

    @property
    def folder(self) -> str:
        """Folder that its file names are relative to."""
        return posixpath.dirname(self.path)


def find_tables(tree: Tree) -> list[Table]:
    """Read the metadata files of a folder that have a column `file_name`.

    Raises:
        RequestError: If one of them cannot be read.
    """
    found = []
    for path in tree.others:
        kind = re.fullmatch(r"metadata\.(csv|jsonl|parquet)", posixpath.basename(path), re.IGNORECASE)
        if kind:
            columns = _read(tree, path, kind[1].lower())
            if FILE_NAME in columns:
                found.append(Table(path, columns))
    return found


def label_column_of(tree: Tree, tables: Sequence[Table], asked: str | None) -> str | None:
    """Return the column of labels, or None if the tables hold none and folders can say the classes.

    Raises:
        RequestError: If it cannot be found, and images lie directly beside a table, so that no folder says their class.
    """
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    known = [name for name in LABEL_NAMES if name in columns]
    if asked in columns:
        return asked
    if known and asked is None:
        return known[0]
    if not {posixpath.dirname(path) for path in tree.images} & {table.folder for table in tables}:
        return None
    others = [name for name in columns if name not in (FILE_NAME, SPLIT)]
    if len(others) == 1 and asked is None:
        return others[0]
    what = f"--label-column {printable(asked)}: there is no such column" if asked else "no column is called label"
    raise RequestError(
        f"{printable(tree.root / tables[0].path)}: {what}; it has {listing(columns)}: name one with --label-column"
    )


def open_tables(tree: Tree, tables: Sequence[Table], label_column: str) -> Source:
    """Open images whose labels stand in tables; splits come from a column `split`, or from the folders of the files.

    Tables without labels, as of a test split, are left out.

    Raises:
        RequestError: If no row has a file, or a file has two labels.
    """
    index = {path: i for i, path in enumerate(tree.images)}
    labels: dict[int, Any] = {}
    splits: dict[int, str] = {}
    missing: list[str] = []
    tables = [table for table in tables if label_column in table.columns]
    for table in tables:
        count = len(table.columns[FILE_NAME])
        wanted = table.columns.get(SPLIT, [None] * count)
        for name, label, split in zip(table.columns[FILE_NAME], table.columns[label_column], wanted, strict=True):
            place = index.get(posixpath.normpath(posixpath.join(table.folder, str(name).replace("\\", "/"))))
            if place is None:
                missing.append(str(name))
                continue
            if labels.setdefault(place, label) != label:
                raise RequestError(
                    f"{printable(tree.root / table.path)} gives {printable(name)} two labels, "
                    f"{printable(labels[place])} and {printable(label)}; expected one row per file"
                )
            if split is not None:
                splits[place] = str(split)
    where = printable(tree.root / tables[0].path)
    if not labels:
        example = f" (the first is {printable(missing[0])})" if missing else ""
        raise RequestError(
            f"{where} names no image that is there{example}; {FILE_NAME} is the path as seen from the table"
        )
    notes = [f"labels from column {printable(label_column)} of {listing(table.path for table in tables)}"]
    unnamed = [path for path in tree.images if index[path] not in labels]
    if missing:
        notes.append(f"{len(missing)} rows without a file left out, such as {printable(missing[0])}")
    if unnamed:
        notes.append(f"{len(unnamed)} images without a row left out, such as {printable(unnamed[0])}")
    roles = [{_role_of(tree.images[i]) for i in part} for part in (labels, [index[path] for path in unnamed])]
    if "train" in roles[1] - roles[0] and "eval" in roles[0]:
        raise RequestError(
            f"{where} has the labels of an evaluation split, and the training split has no table; give it a "
            f"metadata.csv, too, or move {printable(tables[0].path)} away"
        )
    splits = splits if len(splits) == len(labels) else _splits_of(tree, sorted(labels), where)
    return Source(
        tables={
            split: _image_table(tree, [i for i in sorted(labels) if splits[i] == split], label_column, labels, where)
            for split in sorted(set(splits.values()))
        },
        files=tuple((tree.images[i], tree.sizes[i]) for i in sorted(labels)),
        roots=None,
        notes=tuple(notes),
    )


def _splits_of(tree: Tree, images: Sequence[int], where: str) -> dict[int, str]:
    """Return the split of each image: the topmost of its folders that is called like one."""
    found = {i: _split_folder(tree.images[i]) for i in images}
    names = {split for split in found.values() if split is not None}
    if {split_role(name) for name in names} != {"train", "eval"}:
        return dict.fromkeys(images, "train")
    outside = [tree.images[i] for i, split in found.items() if split is None]
    if outside:
        raise RequestError(
            f"{where} names images of the splits {listing(sorted(names))} and {len(outside)} images of none, such as "
            f"{printable(outside[0])}; add a column split"
        )
    return {i: str(split) for i, split in found.items()}


def _split_folder(path: str) -> str | None:
    return next(filter(split_role, path.split("/")[:-1]), None)


def _role_of(path: str) -> str | None:
    folder = _split_folder(path)
    return split_role(folder) if folder else None


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


def _read(tree: Tree, path: str, kind: str) -> dict[str, list[Any]]:
    readers: dict[str, Callable[[bytes], dict[str, list[Any]]]] = {
        "csv": _read_csv,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    try:
        return readers[kind](read_regular(tree.root / path))
    except OSError as error:
        reason = error.strerror or one_line(error)
    except (ValueError, csv.Error, RecursionError) as error:
        reason = one_line(error)
    raise RequestError(f"{printable(tree.root / path)} cannot be read as {kind} ({reason}); mend it or move it away")


def _read_csv(data: bytes) -> dict[str, list[Any]]:
    text = data.decode("utf-8-sig")
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    rows = [row for row in rows if row]
    if not rows:
        return {}
    names = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} columns, the first has {len(names)}")
    return {name: _typed([row[i] for row in rows[1:]]) for i, name in enumerate(names)}


def _typed(values: list[str]) -> list[Any]:
    """Return the values of a CSV column as whole numbers or numbers if all of them are, empty ones as None."""
    filled = [value for value in values if value]
    if all(re.fullmatch(r"-?(0|[1-9]\d*)", value, re.ASCII) for value in filled):  # 007 is a name
        return [int(value) if value else None for value in values]
    if all(re.fullmatch(r"[-+]?\d*\.\d+([eE][-+]?\d+)?|[-+]?\d+\.?|nan", value, re.ASCII) for value in filled) and any(
        "." in value for value in filled
    ):
        return [float(value) if value else None for value in values]
    return [value or None for value in values]


def _read_jsonl(data: bytes) -> dict[str, list[Any]]:
    import msgspec

    rows = msgspec.json.Decoder(dict[str, Any]).decode_lines(data)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(data: bytes) -> dict[str, list[Any]]:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(data))
        features = datasets.Features.from_arrow_schema(table.schema)
    except pyarrow.ArrowException as error:
        raise ValueError(one_line(error)) from error
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [None if value is None else feature.int2str(value) for value in columns[name]]
    return columns
