"""Trackio: a database in its own folder, or a server."""

import contextlib
import os
import sys
from pathlib import Path

from resnext_hub.trackers.tracker import TrackedRun, Tracker

SERVERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables with which Trackio logs to a server."""


class Trackio(Tracker):
    """Continues the run of the same name."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._values: set[tuple[str, int]] = set()
        self._next_step = 0

    def start(self) -> None:
        """Open the run, and read what it contains."""
        import trackio
        from accelerate.tracking import TrackioTracker

        options = {"name": self.run.name, "resume": "allow", "config": dict(self.run.config), "embed": False}
        self.accelerate = TrackioTracker(self.run.project, **options)
        with _messages_aside():
            self.accelerate.start()
        logs = trackio.SQLiteStorage.get_logs(self.run.project, self.run.name)
        self._values = {(name, row["step"]) for row in logs for name in row}
        if any(os.environ.get(name) for name in SERVERS):
            self._next_step = self.accelerate.tracker._next_step  # a server tells no more than its last step

    def has(self, name: str, step: int) -> bool:
        """Return whether the run had the value."""
        return step < self._next_step or (name, step) in self._values

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        import trackio

        self.accelerate.log({name: trackio.Image(str(path))}, step=step)

    def finish(self) -> None:
        """Wait until everything is stored, and close the run."""
        import trackio

        with _messages_aside():
            trackio.finish()  # Accelerate's tracker would let Trackio finish the run once more at exit


def _messages_aside() -> contextlib.AbstractContextManager[object]:
    """Redirect what Trackio prints to standard error; standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr)
