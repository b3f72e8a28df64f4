"""What a tracker has to do, and what all of them know about the run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run, as trackers know it."""

    id: str
    """Identifies the run over all resumes."""
    name: str
    """Unique name of the run: the name of its folder, and the id."""
    project: str
    """Project or experiment that contains the run."""
    config: Mapping[str, Any]
    """Resolved settings, without local paths."""
    folder: Path
    """Where trackers without a place of their own store their files."""


class Tracker(ABC):
    """A run in one tracker, which a resume continues.

    Args:
        run: The run.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.accelerate: Any = None
        """The tracker of Accelerate, once started."""

    @abstractmethod
    def start(self) -> None:
        """Open the run, or create it if there is none."""

    @abstractmethod
    def has(self, name: str, step: int) -> bool:
        """Return whether the run had a value of that name at that step when it was opened."""

    @abstractmethod
    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        self.accelerate.log(dict(values), step=step)

    def finish(self) -> None:
        """Write what is still in memory, and close the run."""
        self.accelerate.finish()
