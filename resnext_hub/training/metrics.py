"""The numbers of a run, a JSON object a line."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnext_hub.data.batches import Unreadable
from resnext_hub.data.columns import listing
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
        if self._found:
            _logger.warning("%d pictures are known not to be readable, from before (%s)", len(self._found), self._path)

    def note(self, split: str, count: int, unreadable: list[Unreadable]) -> None:
        """Write down what is new.

        Args:
            split: `training` or `evaluation`.
            count: Size of the split.
            unreadable: What could not be read.

        Raises:
            RunError: If it is more of the split than may be, and more than one picture.
        """
        new = {(split, entry.name): entry.reason for entry in unreadable}
        new = {key: reason for key, reason in new.items() if key not in self._found}
        if not new:
            return
        self._found |= new
        with open(self._path, "a") as file:
            for (_, picture), reason in new.items():
                done = "others take its place" if split == "training" else "it is left out"
                _logger.warning("%s of the %s split cannot be read (%s): %s", picture, split, reason, done)
                file.write(json.dumps({"split": split, "picture": picture, "reason": reason}) + "\n")
        bad = [f"{picture} ({reason})" for (of, picture), reason in self._found.items() if of == split]
        if len(bad) > max(self._limit * count, 1):
            raise RunError(
                f"{len(bad)} of {count} pictures of the {split} split cannot be read, more than "
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


class Timer:
    """Wall time of the run, training speed between log lines, and the part of it spent waiting for data."""

    def __init__(self, wall_before: float, step: int) -> None:
        now = time.monotonic()
        self._start = now - wall_before
        self._checkpoint = self._lap = now
        self._step = step
        self._waited = self._apart = 0.0

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken so far, over all its resumes."""
        return round(time.monotonic() - self._start, 3)

    @property
    def since_checkpoint(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self._checkpoint

    def checkpointed(self) -> None:
        """Note that a checkpoint was written."""
        self._checkpoint = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave evaluation and saving out of the training speed."""
        begin = time.monotonic()
        yield
        self._apart += time.monotonic() - begin

    def restart(self, step: int) -> float:
        """Begin the lap anew, at a step; give the seconds that are left out so."""
        before = self._lap + self._apart
        self.lap(step, 0)
        return self._lap - before

    def lap(self, step: int, batch_size: int) -> tuple[float, float]:
        """Give images per second, and the fraction of the time spent waiting for data, since the last lap."""
        now = time.monotonic()
        spent = max(now - self._lap - self._apart, 1e-9)
        speed, wait = (step - self._step) * batch_size / spent, self._waited / spent
        self._lap, self._step, self._waited, self._apart = now, step, 0.0, 0.0
        return round(speed, 2), round(wait, 4)
