"""Several label columns with 0 and 1, which state for each label whether an image has it."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from resnext_hub.data.sources.names import is_label_name

_FLAGS = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}
"""Ways to write that an image has a label, or has it not."""


def as_flag(value: object) -> bool | None:
    """Return whether a value states that an image has a label; None if it states neither."""
    return _FLAGS.get(str(value).strip().lower())


def flag_columns(columns: Mapping[str, Iterable[Any]]) -> list[str]:
    """Return the columns that are labels because they hold 0 and 1 only; none unless this is unambiguous.

    At least two such columns are needed, and no other column may define classes: each has as many distinct values as
    rows, as file names and numbers of rows have.

    Args:
        columns: Values by column. Columns of file names and splits are left out.
    """
    found = [name for name, values in columns.items() if holds_flags(values)]
    others = (values for name, values in columns.items() if name not in found)
    if len(found) < 2 or any(is_label_name(name) for name in columns if name not in found):
        return []
    return [] if any(repeats(values) for values in others) else found


def holds_flags(values: Iterable[Any]) -> bool:
    """Return whether a column has values, and only 0 and 1."""
    known: set[Any] = set()
    for value in values:
        if isinstance(value, (list, dict)):
            return False
        if value not in known:  # most columns end this loop at once
            if as_flag(value) is None:
                return False
            known.add(value)
    return bool(known)


def repeats(values: Iterable[Any]) -> bool:
    """Return whether one of the first values occurs again."""
    seen: set[str] = set()
    for value in islice(values, 1000):
        if value is not None and str(value) in seen:
            return True
        seen.add(str(value))
    return False


def join_columns(names: Sequence[str]) -> str:
    """Return several names of columns as one, separated by commas; names that contain one are quoted."""
    quoted = (f'"{name.replace(chr(34), chr(34) * 2)}"' if {",", '"'} & {*name} else name for name in names)
    return ",".join(quoted)


def split_columns(text: str, existing: Iterable[str]) -> list[str]:
    """Return the columns that a text names: one, or several that are separated by commas.

    Args:
        text: A name, or what `join_columns` returns.
        existing: Names of all columns; one that contains commas is not split.
    """
    existing = set(existing)
    names = [text] if text in existing else parse_columns(text)
    return names if set(names) <= existing else [text]


def parse_columns(text: str) -> list[str]:
    """Return the names in a text, separated by commas; a text that cannot be parsed is one name."""
    try:
        names = [name.strip() for name in next(csv.reader([text], strict=True, skipinitialspace=True), [])]
    except csv.Error:
        return [text]
    return names if all(names) and names else [text]
