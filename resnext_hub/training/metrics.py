"""The numbers of a run, a JSON object a line."""

import json
import logging
from pathlib import Path
from typing import Any

from resnext_hub.data.columns import listing
from resnext_hub.data.dataset import Pictures
from resnext_hub.errors import RunError
from resnext_hub.files import write_atomic

_logger = logging.getLogger(__name__)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Give the complete lines of a file; a line that a killed process left half written is none."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class UnreadableLog:
    """What could not be read, each picture once, in a file of this process that a resumed run continues.

    Args:
        folder: The run folder.
        process: Index of this process.
        limit: Part of a split above which the run stops.
    """

    def __init__(self, folder: Path, process: int, limit: float) -> None:
        self._path = folder / f"unreadable-{process}.jsonl"
        self._limit = limit
        self._found = {(line["split"], line["picture"]): line["reason"] for line in read_lines(self._path)}

    def note(self, split: str, pictures: Pictures, unreadable: list[tuple[int, str]]) -> None:
        """Write down what is new.

        Raises:
            RunError: If it is more of the split than may be, and more than one picture.
        """
        new = {(split, pictures.name(index)): reason for index, reason in unreadable}
        new = {key: reason for key, reason in new.items() if key not in self._found}
        if not new:
            return
        self._found |= new
        with open(self._path, "a") as file:
            for (_, picture), reason in new.items():
                _logger.warning("%s cannot be read (%s): it is left out of the %s split", picture, reason, split)
                file.write(json.dumps({"split": split, "picture": picture, "reason": reason}) + "\n")
        bad = [f"{picture} ({reason})" for (of, picture), reason in self._found.items() if of == split]
        if len(bad) > max(self._limit * len(pictures), 1):
            raise RunError(
                f"{len(bad)} of {len(pictures)} pictures of the {split} split cannot be read, more than "
                f"--max-bad-fraction {self._limit:g}: {listing(bad, 20)}; mend them, or allow more"
            )


def read_unreadable(folder: Path) -> list[dict[str, str]]:
    """Give what all processes of a run could not read, each picture once."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for path in sorted(folder.glob("unreadable-*.jsonl")):
        found |= {(line["split"], line["picture"]): line for line in read_lines(path)}
    return [found[key] for key in sorted(found)]


class LineLog:
    """Appends lines to a file that a resumed run continues.

    Args:
        path: The file.
        step: Step of the checkpoint that the run goes on from; lines of later steps go.
        evaluated: Whether that step's evaluation was done; if not, its lines go too.
    """

    def __init__(self, path: Path, step: int, evaluated: bool = True) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= step]
        if not evaluated:
            kept = [line for line in kept if line["step"] < step or "eval_loss" not in line]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, **values: Any) -> None:
        """Append a line; it is with the operating system when this returns."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> "LineLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
