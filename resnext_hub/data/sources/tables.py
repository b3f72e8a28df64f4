"""Images with a table of their labels: `metadata.csv`, `.jsonl` or `.parquet`, as the library datasets has it.

Each row names a file as seen from the table, in the column `file_name`, and holds its label.
"""

import codecs
import csv
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resnext_hub.data.sources.folders import image_table
from resnext_hub.data.sources.names import loose_role, split_role
from resnext_hub.data.sources.source import Source
from resnext_hub.data.sources.walk import Tree
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import FileTooLargeError, read_regular
from resnext_hub.text import listing, printable

FILE_NAME = "file_name"
SPLIT = "split"
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
"""Columns of labels, by name, the one to prefer first."""

MAX_BYTES = 1 << 29
"""Size of a metadata file above which it is refused: it is read whole."""


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
    _require_one_label_column(tree, tables, label_column)
    find = _finder(tree)
    labels: dict[int, Any] = {}
    splits: dict[int, str] = {}
    missing: list[str] = []
    tables = [table for table in tables if label_column in table.columns]
    for table in tables:
        count = len(table.columns[FILE_NAME])
        wanted = table.columns.get(SPLIT, [None] * count)
        for name, label, split in zip(table.columns[FILE_NAME], table.columns[label_column], wanted, strict=True):
            place = find(table.folder, str(name))
            if place is None:
                missing.append(str(name))
                continue
            first = labels.setdefault(place, label)
            if first is not label and first != label:  # a NaN differs from itself
                raise RequestError(
                    f"{printable(tree.root / table.path)} gives {printable(name)} two labels, "
                    f"{printable(first)} and {printable(label)}; expected one row per file"
                )
            if split is not None and str(split).strip():
                splits[place] = str(split).strip()
    where = printable(tree.root / tables[0].path)
    if not labels:
        example = f" (the first is {printable(missing[0])})" if missing else ""
        raise RequestError(
            f"{where} names no image that is there{example}; {FILE_NAME} is the path as seen from the table"
        )
    notes = [f"labels from column {printable(label_column)} of {listing(table.path for table in tables)}"]
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
    splits = _require_all(tree, splits, labels, where) if splits else _splits_of(tree, labels, where)
    return Source(
        tables={
            split: _image_table(tree, [i for i in sorted(labels) if splits[i] == split], label_column, labels, where)
            for split in sorted(set(splits.values()))
        },
        files=tuple((tree.images[i], tree.sizes[i]) for i in sorted(labels)),
        roots=None,
        notes=tuple(notes),
    )


def _require_one_label_column(tree: Tree, tables: Sequence[Table], label_column: str) -> None:
    """Refuse tables whose labels stand in columns of different names: those of one would be left out."""
    for table in tables:
        other = next((name for name in LABEL_NAMES if name in table.columns), None)
        if label_column not in table.columns and other:
            raise RequestError(
                f"{printable(tree.root / table.path)} has a column {other} where another table has "
                f"{printable(label_column)}; call the column of labels alike in all tables"
            )


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
            f"{where}: the column {SPLIT} is empty for {len(without)} of {len(labels)} images, such as "
            f"{printable(tree.images[without[0]])}; fill it in, or remove the column"
        )
    names = sorted(set(splits.values()))
    if len({name.casefold() for name in names}) < len(names):
        raise RequestError(
            f"{where}: the column {SPLIT} has {listing(names)}, some of which differ in upper case alone; spell each "
            "split in one way"
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


def _read(tree: Tree, path: str, kind: str) -> dict[str, list[Any]]:
    readers: dict[str, Callable[[bytes], dict[str, list[Any]]]] = {
        "csv": _read_csv,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    try:
        return readers[kind](read_regular(tree.root / path, limit=MAX_BYTES))
    except FileTooLargeError:
        reason = f"more than {MAX_BYTES >> 20} MB"
    except OSError as error:
        reason = error.strerror or one_line(error)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8: byte 0x{error.object[error.start]:02x} at place {error.start}"
    except (ValueError, csv.Error, RecursionError) as error:
        reason = one_line(error)
    raise RequestError(f"{printable(tree.root / path)} cannot be read as {kind} ({reason}); mend it or move it away")


def _text(data: bytes) -> str:
    """Decode text in UTF-8, or in UTF-16 where it begins with that mark, as spreadsheets write it.

    Raises:
        ValueError: If it is neither.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds null characters; store it as UTF-8")
    return text


def _read_csv(data: bytes) -> dict[str, list[Any]]:
    text = _text(data)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if any(cell.strip() for cell in row)]
    if not numbered:
        return {}
    (_, header), *filled = numbered
    names = [name.strip() for name in header]
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if repeated:
        raise ValueError(f"several of its columns are called {repeated[0]}")
    for number, row in filled:
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} columns, the first has {len(names)}")
    # a column without a name is what pandas numbers rows by
    return {name: _typed([row[i] for _, row in filled]) for i, name in enumerate(names) if name}


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

    rows = msgspec.json.Decoder(dict[str, Any]).decode_lines(_text(data))
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
