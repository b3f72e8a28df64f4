"""TensorBoard: event files in the run folder."""

from pathlib import Path

from resnext_hub.trackers.tracker import TrackedRun, Tracker

METRICS = ("eval/top1", "eval/loss")
"""Columns of the table that compares runs by their settings."""


class TensorBoard(Tracker):
    """Writes an event file for each start of the run; together they contain every step once."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._steps: dict[str, set[int]] = {}

    def start(self) -> None:
        """Read what the event files contain, and open a new one."""
        from accelerate.tracking import TensorBoardTracker
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = self.run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        for kind, read in (("scalars", events.Scalars), ("images", events.Images)):
            self._steps |= {tag: {event.step for event in read(tag)} for tag in events.Tags()[kind]}
        self.accelerate = TensorBoardTracker("", folder)
        self.accelerate.start()
        if not self._steps:
            self._log_settings()

    def has(self, name: str, step: int) -> bool:
        """Return whether an event file had the value."""
        return step in self._steps.get(name, ())

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.accelerate.log_images({name: pixels[None]}, step=step, dataformats="NHWC")

    def _log_settings(self) -> None:
        """Log the settings to the same event file; Accelerate would create another run for them."""
        from torch.utils.tensorboard.summary import hparams

        settings = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in self.run.config.items()
        }
        experiment, session, _ = hparams(settings, dict.fromkeys(METRICS, 0.0))
        writer = self.accelerate.tracker.file_writer
        writer.add_summary(experiment)
        writer.add_summary(session)
        writer.flush()
