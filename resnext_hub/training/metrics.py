"""The numbers of a run, a JSON object a line."""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resnext_hub.agreement import Peers
from resnext_hub.data.batches import Unreadable
from resnext_hub.data.columns import listing
from resnext_hub.errors import RunError, one_line
from resnext_hub.files import read_regular, write_atomic
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

MOST_SHOWN = 20
"""Unreadable images of a split that the log names one by one; the file lists all."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What every line of a run says."""

    step: int


@dataclass(frozen=True, kw_only=True)
class StepLine(Line):
    """A line of metrics.jsonl about a training step."""

    epoch: float
    loss: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class EvaluationLine(Line):
    """A line of metrics.jsonl about an evaluation."""

    epoch: float
    eval_loss: float
    eval_top1: float


@dataclass(frozen=True, kw_only=True)
class UnreadableLine:
    """A line of unreadable-P.jsonl."""

    split: Literal["training", "evaluation"]
    picture: str
    reason: str
    index: int | None = None
    """Place in the split, or key in a stream; runs of older versions did not write it."""


METRICS = (StepLine, EvaluationLine)
"""The kinds of lines in metrics.jsonl."""


def read_lines(path: Path, *kinds: type) -> list[dict[str, Any]]:
    """Return the lines of a file that are JSON objects of one of the kinds, in their order, with all that they say.

    A process that is killed leaves half a line, and a failing disk worse: what is anything else is left out.

    Raises:
        RunError: If the file cannot be read.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{printable(path)} cannot be read ({error.strerror or one_line(error)}); remove it, and rerun the same "
            "command to resume"
        ) from error
    *whole, half = content.split(b"\n")
    lines = [line for text in whole if (line := _parsed(text, kinds)) is not None]
    if len(lines) < len(whole):
        _logger.warning("%s: %d damaged lines are ignored", printable(path), len(whole) - len(lines))
    last = _parsed(half, kinds)
    return lines if last is None else [*lines, last]


def _parsed(text: bytes, kinds: tuple[type, ...]) -> dict[str, Any] | None:
    import msgspec

    try:
        line: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    for kind in kinds:
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert(line, kind)
            return line
    return None


class UnreadableLog:
    """What could not be read, each image once, in a file of the main process that a resumed run continues.

    Args:
        folder: The run folder, on the main process's disk.
        peers: The processes of the run.
        limit: Part of a split above which the run stops.
    """

    def __init__(self, folder: Path, peers: Peers, limit: float) -> None:
        self._path = folder / "unreadable-0.jsonl"
        self._peers = peers
        self._limit = limit
        lines = _unreadable_lines(folder) if peers.is_main else []
        self._known = {(line["split"], line.get("index")) for line in lines}
        self._found: dict[str, dict[int, str]] = {"training": {}, "evaluation": {}}
        self._counts: dict[str, int] = {}
        self._untold: list[tuple[str, Unreadable]] = []
        """What the other processes have not heard of yet."""
        if self._known:
            _logger.warning("%d images are known to be unreadable, from before (%s)", len(self._known), self._path)

    def note(self, split: str, count: int, unreadable: list[Unreadable], in_all: int = 0) -> None:
        """Note what is new; the main process writes down its own at once.

        Images are told apart by their index: their names need not differ.

        Args:
            split: `training` or `evaluation`.
            count: Size of the split.
            unreadable: What this process could not read.
            in_all: How many all processes could not read, where that is known.

        Raises:
            RunError: If it is more of the split than may be, and more than one image. What was found before a resume
                does not count, as it may have been mended.
        """
        self._counts[split] = count
        new = [entry for entry in unreadable if self._add(split, entry)]
        if self._peers.size > 1:
            self._untold += [(split, entry) for entry in new]
        bad = max(len(self._found[split]), in_all)
        if unreadable or in_all:
            self._check(split, bad, everywhere=bad == in_all)

    def collect(self) -> None:
        """Let every process know, and the main one write down, what the others have noted since the last call.

        Raises:
            RunError: In every process, if it is more of a split than may be, and more than one image.
        """
        if self._peers.size == 1:
            return
        noted = self._peers.gather(self._untold)
        self._untold = []
        for split, entry in itertools.chain.from_iterable(noted):
            self._add(split, entry)
        for split in self._counts:
            self._check(split, len(self._found[split]), everywhere=True)

    def _add(self, split: str, entry: Unreadable) -> bool:
        """Add an image if it is new, and return whether it is."""
        found = self._found[split]
        if entry.index in found:
            return False
        found[entry.index] = f"{printable(entry.name)} ({printable(entry.reason)})"
        if self._peers.is_main:
            self._write(split, entry, len(found))
        return True

    def _check(self, split: str, bad: int, *, everywhere: bool) -> None:
        count = self._counts[split]
        if bad > max(self._limit * count, 1):
            raise RunError(
                f"{bad} of {count} images of the {split} split cannot be read, more than --max-bad-fraction "
                f"{self._limit:g}: {listing(self._found[split].values(), 8)}; mend them, or raise --max-bad-fraction",
                everywhere=everywhere,
            )

    def _write(self, split: str, entry: Unreadable, number: int) -> None:
        if (split, entry.index) in self._known:
            return
        self._known.add((split, entry.index))
        name, reason = printable(entry.name), printable(entry.reason)
        done = "others take its place" if split == "training" else "it is left out"
        if number <= MOST_SHOWN:
            _logger.warning("%s of the %s split cannot be read (%s): %s", name, split, reason, done)
        if number == MOST_SHOWN:
            _logger.warning("further ones of the %s split are listed in %s", split, self._path)
        with open(self._path, "a", encoding="utf-8") as file:
            line = {"split": split, "index": entry.index, "picture": name, "reason": reason}
            file.write(json.dumps(line) + "\n")


def read_unreadable(folder: Path) -> list[dict[str, str]]:
    """Return split, picture and reason of what all processes of a run could not read, each image once."""
    lines = _unreadable_lines(folder)
    found = {(line["split"], line["index"]): line for line in lines if line.get("index") is not None}
    names = {(line["split"], line["picture"]) for line in found.values()}
    older = {(line["split"], line["picture"]): line for line in lines if line.get("index") is None}
    chosen = [*found.values(), *(line for key, line in older.items() if key not in names)]
    kept = [{name: line[name] for name in ("split", "picture", "reason")} for line in chosen]
    return sorted(kept, key=lambda line: (line["split"], line["picture"]))


def _unreadable_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for path in sorted(folder.glob("unreadable-*.jsonl")) for line in read_lines(path, UnreadableLine)]


class LineLog:
    """Appends lines to a file that a resumed run continues.

    Args:
        path: The file.
        step: Step of the checkpoint that the run resumes from; lines of later steps are removed.
        evaluated: Whether that step's evaluation was done; if not, its lines go too.
        kinds: What a line may be; others are removed.
    """

    def __init__(self, path: Path, step: int, evaluated: bool = True, kinds: tuple[type, ...] = (Line,)) -> None:
        kept = [line for line in read_lines(path, *kinds) if line["step"] <= step]
        if not evaluated:
            kept = [line for line in kept if line["step"] < step or "eval_loss" not in line]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

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
