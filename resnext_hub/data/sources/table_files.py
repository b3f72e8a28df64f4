"""Read tables (CSV, TSV, JSON lines and parquet) into columns, keeping only a few of them."""

import codecs
import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from resnext_hub.data.sources.flags import as_flag
from resnext_hub.data.sources.parquet import DAMAGED
from resnext_hub.data.sources.texts import TextColumn, Texts
from resnext_hub.data.sources.walk import is_image
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import FileTooLargeError, read_regular
from resnext_hub.text import printable

LABEL_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Suffixes of the tables that can be read."""

MAX_BYTES = 1 << 28
"""Greatest size of a table, which is read as a whole."""

MAX_LINE = 1 << 24
"""Greatest length of a line of JSON."""

SPARE_ROWS = 1_000_000
"""Rows that a table may have in addition to ten per image; this many take seconds to read."""

MAX_ROWS = 10_000_000
"""Rows that a table may have if the number of images is not known."""

MAX_OTHERS = 16
"""Number of columns that are kept in addition to the wanted ones and those of 0 and 1."""

MAX_FLAGS = 1000
"""Number of columns that are kept because their first value is 0 or 1, so that they may be labels."""

Columns = dict[str, Sequence[Any]]


def read_table(path: Path, wanted: Collection[str], images: int | None = None) -> tuple[Columns, list[str]]:
    """Read a table and return its columns by name, and the names of columns that were skipped.

    The columns of a CSV file without a header, whose first row has the name of an image, are called 0, 1, 2 and so on.

    Args:
        path: The table; its suffix defines the format.
        wanted: Names of columns to keep, in any case; of the others, the first `MAX_OTHERS` are kept.
        images: Number of images of the dataset, if it is known.

    Raises:
        RequestError: If it cannot be read, or is far too large for the number of images.
    """
    kind = path.name.rpartition(".")[2].lower()
    readers = {"csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}
    kept = _Kept(wanted, MAX_ROWS if images is None else SPARE_ROWS + 10 * images)
    try:
        return readers[kind](read_regular(path, limit=MAX_BYTES), kept), kept.skipped
    except FileTooLargeError:
        reason = f"more than {MAX_BYTES >> 20} MB"
    except OSError as error:
        reason = error.strerror or one_line(error)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
    except (ValueError, OverflowError, csv.Error, RecursionError) as error:
        reason = one_line(error)
    raise RequestError(f"{printable(path)} cannot be read as {kind} ({reason}); fix it, or move it out of the dataset")


class _Kept:
    """Decides which columns to keep, and limits the number of rows."""

    def __init__(self, wanted: Collection[str], rows: int) -> None:
        self.wanted = {name.casefold() for name in wanted}
        self.rows = rows
        self.others: set[str] = set()
        self.flags: set[str] = set()
        self.skipped: list[str] = []

    def keeps(self, name: str, first: str | None = None) -> bool:
        """Return whether to keep a column, and record the decision.

        Args:
            name: Its name.
            first: Its first value as text, if it is known.
        """
        if name.casefold() in self.wanted or name in self.others or name in self.flags:
            return True
        if first is not None and as_flag(first) is not None and len(self.flags) < MAX_FLAGS:
            self.flags.add(name)
            return True
        if len(self.others) < MAX_OTHERS:
            self.others.add(name)
            return True
        if len(self.skipped) < MAX_OTHERS:
            self.skipped.append(name)
        return False

    def check(self, rows: int) -> None:
        """Raise ValueError if a table has far too many rows."""
        if rows > self.rows:
            raise ValueError(f"more than {self.rows:,} rows; remove the rows whose images do not exist")


def as_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark, as spreadsheets write it.

    Raises:
        ValueError: If it is neither.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    if "\0" in text:
        raise ValueError("it contains null characters; store it as UTF-8")
    return text


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their ends; splitting them all at once would take several times the memory of the text."""
    end = "\n" if "\n" in text else "\r"
    start = 0
    while start < len(text):
        stop = text.find(end, start) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _read_csv(data: bytes, kept: _Kept) -> Columns:
    text = re.sub(r"\A(?:[ \t]*\r?\n)+", "", as_text(data))
    del data  # which may have hundreds of megabytes
    stated = re.match(r"sep=([,;|\t])\r?\n", text, re.IGNORECASE)  # as Excel writes it
    text = text[stated.end() :] if stated else text
    delimiter = stated[1] if stated else _delimiter_of(next(_lines(text), ""))
    rows: Iterator[tuple[int, list[str]]] = enumerate(
        csv.reader(_stripped(text, delimiter), delimiter=delimiter, strict=True), start=1
    )
    first = next(((number, row) for number, row in rows if any(map(str.strip, row))), (0, []))
    names = [name.strip() for name in first[1]]
    if any(map(is_image, names)):
        rows, names = chain([first], rows), [str(i) for i in range(len(names))]
    _reject_repeated(names)
    second = next(rows, None)
    values = [""] * len(names) if second is None or len(second[1]) != len(names) else second[1]
    rows = rows if second is None else chain([second], rows)
    # a column without a name is the index that pandas writes
    places = [(i, Texts()) for i, name in enumerate(names) if name and kept.keeps(name, values[i])]
    count = 0
    for number, row in rows:
        if not any(map(str.strip, row)):
            continue
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} columns, but the first row has {len(names)}")
        count += 1
        kept.check(count)
        for i, column in places:
            column.append(row[i])
    return {names[i]: TextColumn(column) for i, column in places}


def _delimiter_of(header: str) -> str:
    """Return the delimiter beside `file_name` in the header, else the most frequent one."""
    delimiters = sorted(",;\t|", key=header.count, reverse=True)
    named = re.search(r"(?:^|([,;\t|]))\s*\"?file_name\"?\s*(?:([,;\t|])|$)", header, re.IGNORECASE)
    return (named and (named[1] or named[2])) or delimiters[0]


def _stripped(text: str, delimiter: str) -> Iterator[str]:
    """Yield the lines of a CSV file without whitespace around cells; it is kept in quotes."""
    blank = " " if delimiter == "\t" else " \t"
    parts = re.compile(f'"[^"]*"|[{blank}]+')
    for line in _lines(text):
        if " " not in line and "\t" not in line:
            yield line
        elif '"' not in line:
            yield delimiter.join(cell.strip(blank) for cell in line.rstrip("\r\n").split(delimiter)) + "\n"
        else:
            row = f"{delimiter}{line}\n"
            ends = f"{delimiter}\r\n"

            def kept(part: re.Match[str], row: str = row, ends: str = ends) -> str:
                at_end = row[part.start() - 1] in ends or row[part.end()] in ends
                return "" if at_end and part[0][0] != '"' else part[0]

            yield parts.sub(kept, row)[1:-1]


def _read_jsonl(data: bytes, kept: _Kept) -> Columns:
    import msgspec

    decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
    columns: dict[str, list[Any]] = {}
    count = 0
    for number, line in enumerate(_lines(as_text(data)), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} is longer than {MAX_LINE >> 20} MB")
        try:
            row = {
                name: msgspec.json.decode(raw)
                for name, raw in decoder.decode(line).items()
                if kept.keeps(name, bytes(raw).decode() if len(raw) < 6 else None)
            }
        except msgspec.DecodeError as error:
            raise ValueError(f"line {number}: {one_line(error)}") from error
        for name, value in row.items():
            column = columns.setdefault(name, [])
            column += [None] * (count - len(column))
            column.append(value)
        count += 1
        kept.check(count)
    return {name: [*column, *[None] * (count - len(column))] for name, column in columns.items()}


def _read_parquet(data: bytes, kept: _Kept) -> Columns:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        content = parquet.ParquetFile(pyarrow.BufferReader(data))
        kept.check(content.metadata.num_rows)
        schema = content.schema_arrow
        _reject_repeated(schema.names)
        flags = _flags_of(content.metadata, schema)
        fields = [
            field
            for field in schema
            if _could_name(field.type) or field.name in flags or field.name.casefold() in kept.wanted
        ]
        fields = [field for field in fields if kept.keeps(field.name, "0" if field.name in flags else None)]
        texts = [field.name for field in fields if pyarrow.types.is_string(field.type)]
        # dictionaries store repeated texts once
        content = parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=texts)
        table = content.read(columns=[field.name for field in fields])
    except pyarrow.ArrowException as error:
        raise ValueError(one_line(error)) from error
    try:
        features = datasets.Features.from_arrow_schema(pyarrow.schema(fields, metadata=schema.metadata))
    except DAMAGED as error:
        raise ValueError(f"its schema is damaged ({one_line(error)})") from error
    columns: Columns = {name: _values(table[name]) for name in table.column_names}
    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [None if value is None else feature.int2str(value) for value in columns[name]]
        elif isinstance(getattr(feature, "feature", None), datasets.ClassLabel):
            names = feature.feature
            columns[name] = [
                None if row is None else [None if value is None else names.int2str(value) for value in row]
                for row in columns[name]
            ]
    return columns


def _flags_of(metadata: Any, fields: Iterable[Any]) -> set[str]:
    """Return the columns of a parquet file that hold truth values, or numbers from 0 to 1 according to the footer."""
    from pyarrow import types

    found = {field.name for field in fields if types.is_boolean(field.type)}
    numbers = {field.name for field in fields if types.is_integer(field.type) or types.is_floating(field.type)}
    for i in range(metadata.num_columns if metadata.num_row_groups else 0):
        column = metadata.row_group(0).column(i)
        facts = column.statistics if column.path_in_schema in numbers else None
        if facts is not None and facts.has_min_max and (facts.min, facts.max) in ((0, 0), (0, 1), (1, 1)):
            found.add(column.path_in_schema)
    return found


def _could_name(kind: Any) -> bool:
    """Return whether a column of this type could contain file names, splits or labels."""
    from pyarrow import types

    tests: Iterable[Callable[[Any], bool]] = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_boolean,
        types.is_dictionary, types.is_list, types.is_large_list,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _values(column: Any) -> list[Any]:
    from pyarrow import types

    if not types.is_dictionary(column.type):
        return list(column.to_pylist())
    found: list[Any] = []
    for chunk in column.chunks:
        names = chunk.dictionary.to_pylist()
        found += [None if code is None else names[code] for code in chunk.indices.to_pylist()]
    return found


def _reject_repeated(names: Iterable[str]) -> None:
    repeated = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if repeated is not None:
        raise ValueError(f"it has several columns called {printable(repeated)}")
