"""Trackio: a database in its own folder, or a server."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from resnext_hub.trackers.tracker import TrackedRun, Tracker


class Trackio(Tracker):
    """Continues the run of the same name."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._values: set[tuple[str, int]] = set()
        self._last_step = -1

    def start(self) -> None:
        """Open the run, and read what it contains."""
        import trackio
        from accelerate.tracking import TrackioTracker

        options = {"name": self.run.name, "resume": "allow", "config": dict(self.run.config), "embed": False}
        self.accelerate = TrackioTracker(self.run.project, **options)
        with _messages_aside():
            self.accelerate.start()
        opened = self.accelerate.tracker
        if opened.url is None:
            logs = trackio.SQLiteStorage.get_logs(self.run.project, self.run.name)
        else:
            self._last_step = opened._next_step - 1  # a server leaves out some of the earlier steps
            logs = self._logs_of_server(opened.url) if self._last_step >= 0 else []
        self._values = {(name, row["step"]) for row in logs for name in row}

    def has(self, name: str, step: int) -> bool:
        """Return whether the run had the value."""
        return step < self._last_step or (name, step) in self._values

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        import trackio

        self.accelerate.log({name: trackio.Image(str(path))}, step=step)

    def finish(self) -> None:
        """Wait until everything is stored, and close the run."""
        import trackio

        with _messages_aside():
            trackio.finish()  # Accelerate's tracker would let Trackio finish the run once more at exit

    def _logs_of_server(self, address: str) -> list[dict[str, Any]]:
        """Return the values that a server shows: those of the last step, and of up to thousands of earlier ones."""
        from huggingface_hub import get_token
        from trackio.remote_client import RemoteClient

        if os.environ.get("TRACKIO_SPACE_ID"):
            client = RemoteClient(address, hf_token=get_token())
        else:  # the variable may contain the token
            server = os.environ.get("TRACKIO_SERVER_URL", address)
            client = RemoteClient(server, write_token=os.environ.get("TRACKIO_WRITE_TOKEN"))
        logs: list[dict[str, Any]] = client.predict(self.run.project, self.run.name, api_name="/get_logs")
        return logs


def _messages_aside() -> contextlib.AbstractContextManager[object]:
    """Redirect what Trackio prints to standard error; standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr)
