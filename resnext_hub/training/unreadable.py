"""Unreadable images of a run: counted and listed; too many of them stop the run."""

import itertools
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

from resnext_hub.data.batches import Unreadable
from resnext_hub.errors import RunError, setting
from resnext_hub.facts import UnreadableImage
from resnext_hub.processes.peers import Peers
from resnext_hub.record import renamed_image
from resnext_hub.run_folder import RunFolder
from resnext_hub.text import listing, printable
from resnext_hub.training.metrics import read_lines

_logger = logging.getLogger(__name__)

MAX_LOGGED = 20
"""Number of unreadable images of a split to log one by one; the file lists all of them."""


@dataclass(frozen=True, kw_only=True)
class UnreadableLine:
    """A line of unreadable-P.jsonl."""

    split: Literal["training", "evaluation", "test"]
    image: str
    reason: str
    index: int | None = None
    """Index in the split, or key in a stream; not written before version 0.2."""


class UnreadableLog:
    """Unreadable images, each counted once; the main process lists them in a file that a resumed run continues.

    Args:
        folder: The run folder.
        peers: The processes of the run.
        limit: Fraction of a split, 0 to 1, above which the run stops.
    """

    def __init__(self, folder: RunFolder, peers: Peers, limit: float) -> None:
        self._path = folder.unreadable
        self._peers = peers
        self._limit = limit
        lines = _unreadable_lines(folder) if peers.is_main else []
        self._known = {(line["split"], line.get("index")) for line in lines}
        self._found: dict[str, dict[int, str]] = {"training": {}, "evaluation": {}, "test": {}}
        self._counts: dict[str, int] = {}
        self._unshared: list[tuple[str, Unreadable]] = []
        """Images that the other processes do not know of yet."""
        if self._known:
            _logger.warning("%d images were unreadable before the resume (%s)", len(self._known), self._path)

    def note(self, split: str, count: int, unreadable: list[Unreadable], total: int = 0) -> None:
        """Count unreadable images that are new; the main process lists its own at once.

        Images are identified by index, because names need not be unique.

        Args:
            split: `training`, `evaluation` or `test`.
            count: Size of the split.
            unreadable: Images that this process could not read.
            total: Number of images that all processes together could not read, if known.

        Raises:
            RunError: If the limit is exceeded, by more than one image. Images found before a resume do not count,
                because they may have been fixed.
        """
        self._counts[split] = count
        new = [entry for entry in unreadable if self._add(split, entry)]
        if self._peers.size > 1:
            self._unshared += [(split, entry) for entry in new]
        count_unreadable = max(len(self._found[split]), total)
        if unreadable or total:
            self._check(split, count_unreadable, everywhere=count_unreadable == total)

    def collect(self) -> None:
        """Share the images found since the last call with all processes; the main process lists them.

        Raises:
            RunError: In every process, if the limit is exceeded, by more than one image.
        """
        if self._peers.size == 1:
            return
        noted = self._peers.gather(self._unshared)
        self._unshared = []
        for split, entry in itertools.chain.from_iterable(noted):
            self._add(split, entry)
        for split in self._counts:
            self._check(split, len(self._found[split]), everywhere=True)

    def _add(self, split: str, entry: Unreadable) -> bool:
        """Add an image; return whether it is new."""
        found = self._found[split]
        if entry.index in found:
            return False
        found[entry.index] = f"{printable(entry.name)} ({printable(entry.reason)})"
        if self._peers.is_main:
            self._write(split, entry, len(found))
        return True

    def _check(self, split: str, unreadable: int, *, everywhere: bool) -> None:
        count = self._counts[split]
        if unreadable > max(self._limit * count, 1):
            raise RunError(
                f"{unreadable} of {count} images of the {split} split are unreadable, more than "
                f"{setting('max_bad_fraction', f'{self._limit:g}')} allows: "
                f"{listing(self._found[split].values(), 8)}; fix them, or increase {setting('max_bad_fraction')}",
                everywhere=everywhere,
            )

    def _write(self, split: str, entry: Unreadable, number: int) -> None:
        if (split, entry.index) in self._known:
            return
        self._known.add((split, entry.index))
        name, reason = printable(entry.name), printable(entry.reason)
        effect = "replaced by another image" if split == "training" else "excluded"
        if number <= MAX_LOGGED:
            _logger.warning("%s of the %s split is unreadable (%s); it is %s", name, split, reason, effect)
        if number == MAX_LOGGED:
            _logger.warning("further unreadable images of the %s split are listed in %s", split, self._path)
        with open(self._path, "a", encoding="utf-8") as file:
            line = {"split": split, "index": entry.index, "image": name, "reason": reason}
            file.write(json.dumps(line) + "\n")


def read_unreadable(folder: RunFolder) -> list[UnreadableImage]:
    """Return the unreadable images of a run, each once."""
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
