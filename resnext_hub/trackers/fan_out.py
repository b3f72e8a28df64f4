"""Send the lines of metrics.jsonl to the trackers of a run.

metrics.jsonl is the source of truth: at a start, a tracker gets the lines that it lacks, and afterwards the lines that
it does not have. So a killed run and its resume leave every step once, whatever was lost or repeated in between.
"""

import contextlib
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnext_hub.errors import RunError, one_line, setting
from resnext_hub.files import write_atomic
from resnext_hub.trackers.mlflow import MLflow
from resnext_hub.trackers.tensorboard import TensorBoard
from resnext_hub.trackers.tracker import TrackedRun, Tracker
from resnext_hub.trackers.trackio import Trackio
from resnext_hub.trackers.wandb import Wandb

_logger = logging.getLogger(__name__)

_KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb, "mlflow": MLflow}

_WHILE_RUNNING = "the run continues without it, and logs the missing metrics when it ends or is resumed"
_AT_THE_END = "the missing metrics are in metrics.jsonl"


class Trackers:
    """The trackers of a run; one that fails is left out, and never stops the run.

    Args:
        names: Names of the trackers.
        folder: Folder of trackers in the run folder.
        project: Project or experiment that contains the run.
        name: Name of the run; an id is added, since other runs may have the same name.
        config: Resolved settings, without local paths.
    """

    def __init__(self, names: Sequence[str], folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._names = names
        self._running: dict[str, Tracker] = {}
        self._failed: dict[str, Tracker] = {}
        if names:
            id = _identity(folder)
            self._run = TrackedRun(id=id, name=f"{name}-{id}", project=project, config=config, folder=folder)

    def start(self, lines: Sequence[Mapping[str, Any]], resumed: bool) -> None:
        """Start the trackers, and send them the lines that they lack.

        Args:
            lines: Lines of metrics.jsonl up to the current step.
            resumed: Whether the run is resumed; if so, a tracker that cannot be started is left out with a warning.

        Raises:
            RunError: If a tracker of a new run cannot be started.
        """
        for name in self._names:
            try:
                self._start(name, lines)
            except Exception as error:
                if not resumed:
                    raise RunError(
                        f"{name} cannot be started ({one_line(error)}); fix that, or omit it from {setting('track')}"
                    ) from error
                self._leave_out(name, error, _WHILE_RUNNING)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl to the trackers."""
        for name, tracker in list(self._running.items()):
            try:
                _send(tracker, line)
            except Exception as error:  # noqa: BLE001 - trackers raise errors of many kinds
                self._leave_out(name, error, _WHILE_RUNNING)

    def finish(self, lines: Sequence[Mapping[str, Any]], images: Mapping[str, Path], step: int) -> None:
        """Send the images of a run that is complete, and close the trackers; those that failed get another chance.

        Args:
            lines: All lines of metrics.jsonl.
            images: Image files by name.
            step: The last step.
        """
        for name in self._names:
            try:
                if name in self._failed:
                    with contextlib.suppress(Exception):
                        self._failed.pop(name).finish()
                tracker = self._running.get(name) or self._start(name, lines)
                for image, path in images.items():
                    if not tracker.has(image, step):
                        tracker.log_image(image, path, step)
            except Exception as error:  # noqa: BLE001 - trackers raise errors of many kinds
                self._leave_out(name, error, _AT_THE_END)
        self.close()

    def close(self) -> None:
        """Close the trackers that are running, such as those of a run that was stopped."""
        for name, tracker in list(self._running.items()):
            del self._running[name]
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001 - trackers raise errors of many kinds
                self._leave_out(name, error, _AT_THE_END)

    def _start(self, name: str, lines: Sequence[Mapping[str, Any]]) -> Tracker:
        tracker = _KINDS[name](self._run)
        tracker.start()
        for line in lines:
            _send(tracker, line)
        self._running[name] = tracker
        return tracker

    def _leave_out(self, name: str, error: Exception, consequence: str) -> None:
        if name in self._running:
            self._failed[name] = self._running.pop(name)
        _logger.warning("%s failed (%s); %s", name, one_line(error), consequence)


def _send(tracker: Tracker, line: Mapping[str, Any]) -> None:
    """Send the numbers of a line that the tracker does not have."""
    step = line["step"]
    values = {name: value for name, value in _numbers(line).items() if not tracker.has(name, step)}
    if values:
        tracker.log(values, step)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line: `loss` as `train/loss`, `eval_loss` as `eval/loss`."""
    kind = "eval" if "eval_loss" in line else "train"
    return {
        f"{kind}/{name.removeprefix('eval_')}": value
        for name, value in line.items()
        if name != "step" and isinstance(value, (int, float))
    }


def _identity(folder: Path) -> str:
    """Return the id of the run in a folder, which is stored there at its first start."""
    path = folder / "id"
    if path.is_file():
        id = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{8}", id):
            return id
    folder.mkdir(parents=True, exist_ok=True)
    id = secrets.token_hex(4)
    write_atomic(path, f"{id}\n")
    return id
