"""Weights & Biases: its server or, offline, files in the run folder."""

import contextlib
import os
import shutil
from pathlib import Path

from resnext_hub.trackers.tracker import TrackedRun, Tracker


class Wandb(Tracker):
    """Continues the run with the same id."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._next_step = 0

    def start(self) -> None:
        """Open the run; offline, start over, because a killed run leaves incomplete files that wandb cannot read."""
        from accelerate.tracking import WandBTracker

        options = {"id": self.run.id, "name": self.run.name, "resume": "allow", "settings": {"console": "off"}}
        if "WANDB_DIR" not in os.environ:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            options["dir"] = str(self.run.folder)  # wandb creates the folder wandb in it
        self.accelerate = WandBTracker(os.environ.get("WANDB_PROJECT") or self.run.project, **options)
        self.accelerate.start()
        self.accelerate.store_init_configuration(dict(self.run.config))
        opened = self.accelerate.tracker
        if opened.offline:
            _remove_earlier(Path(opened.dir).parent, self.run.id)
        else:
            self._next_step = opened.starting_step

    def has(self, name: str, step: int) -> bool:
        """Return whether the server had the step."""
        return step < self._next_step

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        self.accelerate.log_images({name: [str(path)]}, step=step)

    def finish(self) -> None:
        """Write what is still in memory, and close the run."""
        import wandb

        try:
            super().finish()
        except Exception:
            with contextlib.suppress(Exception):  # it raises if wandb's service is gone, and forgets it
                wandb.teardown()
            raise


def _remove_earlier(current: Path, id: str) -> None:
    """Remove the files of earlier starts of a run, except those that were uploaded."""
    for folder in current.parent.glob(f"offline-run-*-{id}"):
        if folder != current and not any(folder.glob("*.synced")):
            shutil.rmtree(folder)
