"""JSON Lines files that a resumed run continues, such as metrics.jsonl."""

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_hub.errors import RunError, one_line
from resnext_hub.files import read_regular, write_atomic
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Fields of every line."""

    step: int


@dataclass(frozen=True, kw_only=True)
class StepLine(Line):
    """Required fields of a metrics.jsonl line about a training step."""

    epoch: float
    loss: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class EvaluationLine(Line):
    """Required fields of a metrics.jsonl line about an evaluation."""

    epoch: float
    eval_loss: float
    eval_top1: float


METRICS = (StepLine, EvaluationLine)
"""Kinds of lines in metrics.jsonl."""


def read_lines(path: Path, *kinds: type, upgrade: Callable[[Any], Any] = lambda line: line) -> list[dict[str, Any]]:
    """Return the lines of a file that match one of the kinds, in order, with all their fields.

    Damaged lines, such as the partial line that a killed process leaves, are ignored with a warning.

    Args:
        path: The file.
        kinds: Dataclasses; a line must match at least one of them.
        upgrade: Converts a line of an earlier version before it is validated.

    Raises:
        RunError: If the file cannot be read.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{printable(path)} cannot be read ({error.strerror or one_line(error)}); remove it and rerun the same "
            "command to resume"
        ) from error
    *whole, partial = content.split(b"\n")
    lines = [line for text in whole if (line := _parsed(text, kinds, upgrade)) is not None]
    if len(lines) < len(whole):
        _logger.warning("%s: ignored %d damaged lines", printable(path), len(whole) - len(lines))
    last = _parsed(partial, kinds, upgrade)
    return lines if last is None else [*lines, last]


def _parsed(text: bytes, kinds: tuple[type, ...], upgrade: Callable[[Any], Any]) -> dict[str, Any] | None:
    import msgspec

    try:
        line: dict[str, Any] = upgrade(msgspec.json.decode(text, type=dict[str, Any]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    for kind in kinds:
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert(line, kind)
            return line
    return None


class LineLog:
    """A JSON Lines file that a resumed run continues.

    Args:
        path: The file.
        step: Step that the run starts or resumes from; lines of later steps are removed.
        evaluated: Whether the evaluation of that step is done; if not, its lines are removed as well.
        kinds: Kinds of lines to keep; others are removed.
    """

    def __init__(self, path: Path, step: int, evaluated: bool = True, kinds: tuple[type, ...] = (Line,)) -> None:
        kept = [line for line in read_lines(path, *kinds) if line["step"] <= step]
        if not evaluated:
            kept = [line for line in kept if line["step"] < step or "eval_loss" not in line]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - stays open during the run

    def write(self, **values: Any) -> None:
        """Append a line and flush it to the operating system."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "LineLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
