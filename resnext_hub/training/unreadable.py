"""The images of a run that could not be decoded: counted, listed, and a reason to stop where there are too many."""

import itertools
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

from resnext_hub.data.batches import Unreadable
from resnext_hub.errors import RunError
from resnext_hub.processes.peers import Peers
from resnext_hub.record import UnreadableImage, renamed_image
from resnext_hub.run_folder import RunFolder
from resnext_hub.text import listing, printable
from resnext_hub.training.metrics import read_lines

_logger = logging.getLogger(__name__)

MOST_SHOWN = 20
"""Unreadable images of a split that the log names one by one; the file lists all."""


@dataclass(frozen=True, kw_only=True)
class UnreadableLine:
    """A line of unreadable-P.jsonl."""

    split: Literal["training", "evaluation"]
    image: str
    reason: str
    index: int | None = None
    """Place in the split, or key in a stream; runs of older versions did not write it."""


class UnreadableLog:
    """What could not be read, each image once, in a file of the main process that a resumed run continues.

    Args:
        folder: The run folder, on the main process's disk.
        peers: The processes of the run.
        limit: Part of a split above which the run stops.
    """

    def __init__(self, folder: RunFolder, peers: Peers, limit: float) -> None:
        self._path = folder.unreadable
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
            line = {"split": split, "index": entry.index, "image": name, "reason": reason}
            file.write(json.dumps(line) + "\n")


def read_unreadable(folder: RunFolder) -> list[UnreadableImage]:
    """Return the images that any process of a run could not decode, each once."""
    lines = _unreadable_lines(folder)
    found = {(line["split"], line["index"]): line for line in lines if line.get("index") is not None}
    names = {(line["split"], line["image"]) for line in found.values()}
    older = {(line["split"], line["image"]): line for line in lines if line.get("index") is None}
    chosen = [*found.values(), *(line for key, line in older.items() if key not in names)]
    kept = [UnreadableImage(split=line["split"], image=line["image"], reason=line["reason"]) for line in chosen]
    return sorted(kept, key=lambda entry: (entry.split, entry.image))


def _unreadable_lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [
        line for path in folder.unreadable_lists for line in read_lines(path, UnreadableLine, upgrade=renamed_image)
    ]
