"""Settings by name: text and YAML converted to the type of a field, within the range that the field allows.

Flags and files go through the same functions, so `--lr 1e-3` and `lr: 1e-3` are the same value or the same error.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from resnext_hub.errors import RequestError, setting
from resnext_hub.text import printable
from resnext_hub.yaml_files import YAML_FLOAT

TEXT_LENGTH = 4096
"""Longest text of a setting in characters: as long as a path may be."""

SEEDS = 2**63 - 1
"""Largest seed that torch accepts."""


GROWS: Mapping[str, Any] = {"resume": "grows"}
"""Metadata of a field that may only be increased when a run is resumed."""

FREE: Mapping[str, Any] = {"resume": "free"}
"""Metadata of a field that may change when a run is resumed: it sets how the work is done, not what work it is."""

FREE_PER_PROCESS: Mapping[str, Any] = {"resume": "free", "per_process": True}
"""The same for a field that may also differ between the processes of a run."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field allows, as metadata of its type: `Annotated[float, Range(0, 1)]`.

    Args:
        low: Smallest number.
        high: Greatest number.
        above: Whether `low` itself is excluded.
        below: Whether `high` itself is excluded.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        after = self.low < value if self.above else self.low <= value
        return after and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.above or self.below:
            low, high = "above" if self.above else "of at least", "below" if self.below else "at most"
            return f"{low} {self.low:g} and {high} {_short(self.high)}"
        return f"from {self.low:g} to {_short(self.high)}"


def _short(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def is_optional(hint: Any) -> bool:
    """Return whether a type is `X | None`."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def without_none(hint: Any) -> Any:
    """Return X of `X | None`, and any other type unchanged."""
    return next(part for part in typing.get_args(hint) if part is not type(None)) if is_optional(hint) else hint


def shown(value: object) -> str:
    """Return a value for a message: printable, in one line, shortened in the middle if it is long."""
    text = printable(value)
    return text if len(text) <= 80 else f"{text[:50]}…{text[-20:]}"


def did_you_mean(word: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean NAME?` for a mistyped word, or an empty string if nothing is close."""
    known = list(known)
    if word in known or (aliases and word in aliases):
        close = [word if word in known else (aliases or {})[word]]
    else:
        close = difflib.get_close_matches(word[:TEXT_LENGTH], known, n=2, cutoff=0.8)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value converted to a field's type: text is parsed, integers become floats, lists become tuples.

    Raises:
        RequestError: If the value is of another type, or outside the type's `Range`.
    """
    hint, bounds = _plain(hint)
    if is_optional(hint):
        if value is None:
            return None
        hint, bounds = _plain(without_none(hint))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise RequestError(f"{setting(name, shown(value))}: expected one of {', '.join(typing.get_args(hint))}")
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if isinstance(value, (list, tuple)) and len(value) == len(parts):
            return tuple(check_value(name, v, part) for v, part in zip(value, parts, strict=True))
        raise RequestError(f"{setting(name, shown(value))}: expected {len(parts)} numbers")
    parsed = _PARSERS[hint](value)
    if parsed is None:
        raise RequestError(f"{setting(name, shown(value))}: expected {_expected(hint, bounds)}")
    _require_range(name, parsed, bounds)
    if hint is str:
        _require_text(name, parsed)
    return parsed


def is_count(text: str, most: int) -> bool:
    """Return whether text is an integer from 1 to a limit."""
    return re.fullmatch(r"0*[1-9][0-9]{0,17}", text, re.ASCII) is not None and int(text) <= most


def check_fields(settings: object) -> None:
    """Raise a RequestError if a field of a dataclass is outside the range of its type."""
    for name, hint in _hints(type(settings)).items():  # type: ignore[arg-type] # a type is hashable
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None:
                _require_range(name, number, _range_of(hint))


_WHOLE = r"[-+]?(?:0|[1-9][0-9]{0,99})"

_EXACT = 2.0**53
"""Every integer up to here is exact as a float."""


def _parse_whole(value: Any) -> int | None:
    if isinstance(value, str):
        text = re.sub(r"(?<=\d)_(?=\d)", "", value.strip())
        value = int(text) if re.fullmatch(_WHOLE, text) else _parse_number(text)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)  # 1e3
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _parse_number(value: Any) -> float | None:
    if isinstance(value, str):
        text = re.sub(r"(?<=\d)_(?=\d)", "", value.strip())
        value = float(text) if re.fullmatch(f"{YAML_FLOAT}|{_WHOLE}", text) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _GREATEST:
        return None
    return float(value)


_GREATEST = int(1.7e308)


def _parse_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def _parse_text(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # threads: 2 and checkpoint_every: 500, as YAML reads them
    return value if isinstance(value, str) else None


_PARSERS: dict[Any, Any] = {int: _parse_whole, float: _parse_number, bool: _parse_bool, str: _parse_text}


def _expected(hint: Any, bounds: Range | None) -> str:
    what = {float: "a number", int: "a whole number", bool: "true or false", str: "text, in quotes"}[hint]
    return f"{what} {bounds}" if bounds else what


def _require_range(name: str, value: Any, bounds: Range | None) -> None:
    if bounds is not None and value not in bounds:
        raise RequestError(f"{setting(name, shown(value))}: expected {_expected(type(value), bounds)}")


def _require_text(name: str, value: str) -> None:
    if not value.strip():
        raise RequestError(f"{setting(name)} is empty: expected text, or no {setting(name)} at all")
    if len(value) > TEXT_LENGTH or "\0" in value:
        reason = "contains a null character" if "\0" in value else f"has {len(value):,} characters"
        raise RequestError(
            f"{setting(name, shown(value))} {reason}: expected text of at most {TEXT_LENGTH:,} characters"
        )


def _plain(hint: Any) -> tuple[Any, Range | None]:
    if typing.get_origin(hint) is typing.Annotated:
        kind, *extras = typing.get_args(hint)
        return kind, next((extra for extra in extras if isinstance(extra, Range)), None)
    return hint, None


def _range_of(hint: Any) -> Range | None:
    """Return the range in a type: its own, that of the part that is not None, or that of the elements of a tuple."""
    kind, bounds = _plain(hint)
    if bounds is None and (is_optional(kind) or typing.get_origin(kind) is tuple):
        return next(filter(None, map(_range_of, typing.get_args(kind))), None)
    return bounds


@lru_cache(maxsize=32)
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
