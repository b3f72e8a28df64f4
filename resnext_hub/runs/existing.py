"""What a run folder holds already: nothing, an unfinished run, or a finished one, and whether it is the requested run."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_hub.data.splits import Splits
from resnext_hub.errors import RequestError, one_line
from resnext_hub.yaml_files import read_yaml
from resnext_hub.hub.publish import require_model
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.public import public_settings
from resnext_hub.settings import flag_of
from resnext_hub.text import listing, printable
from resnext_hub.training.config import TrainConfig, growing_fields, resumable_fields
from resnext_hub.training.schedule import Schedule, plan_schedule

_logger = logging.getLogger(__name__)

CONFIG_VERSION = 1
"""Format version of config.yaml; files before version 0.3 do not state it and are of version 1."""

_LAST_SETTING = "private"
"""The setting that config.yaml has ended with since the first release; a file without it was cut off."""


@dataclass(frozen=True, kw_only=True)
class ExistingRun:
    """What a run folder holds. On several hosts only the main process's folder counts."""

    settings: dict[str, Any]
    """The run's flat settings; empty if there is no run."""
    steps: int | None = None
    """Steps of the run, if it is finished."""
    fingerprint: str | None = None
    """Dataset of the run, if it is finished."""
    state: tuple[str | None, ...] = ()
    """`RunFolder.state` when it was read."""
    fault: str | None = None
    """Why the model folder does not hold the recorded model, if it does not."""


def read_existing(folder: RunFolder) -> ExistingRun:
    """Read what a run folder holds; nothing is created.

    Raises:
        RequestError: If it cannot be a run folder, or what it holds cannot be read.
    """
    _require_usable(folder)
    state = folder.state()
    settings = read_config(folder)
    if not (settings and os.path.lexists(folder.record)):
        require_writable(folder)
        return ExistingRun(settings=settings, state=state)
    record = RunRecord.load(folder.record)
    fault = None
    try:
        require_model(folder.model, record)
    except RequestError as error:
        fault = str(error)
    return ExistingRun(
        settings=settings, steps=record.steps, fingerprint=record.dataset.fingerprint, state=state, fault=fault
    )


def read_config(folder: RunFolder) -> dict[str, Any]:
    """Return the flat settings in a folder's config.yaml, or none if there is no such file.

    Raises:
        RequestError: If the file is damaged, or of a newer format version.
    """
    path = folder.config
    if not os.path.lexists(path):
        return {}
    way_out = "restore the file, or choose another --output-dir"
    content = read_yaml(path, way_out)
    version = content.pop("format_version", CONFIG_VERSION)
    if version != CONFIG_VERSION or isinstance(version, bool):
        raise RequestError(
            f"{printable(path)} has format version {printable(version)[:40]}; this version of resnext-hub reads "
            f"{CONFIG_VERSION}; update resnext-hub, or choose another --output-dir"
        )
    try:
        TrainConfig.from_flat(content)
    except RequestError as error:
        raise RequestError(f"{printable(path)} is damaged ({one_line(error)}); {way_out}") from error
    if _LAST_SETTING not in content:
        raise RequestError(f"{printable(path)} is damaged (it ends before its last setting); {way_out}")
    return content


def is_finished(
    folder: RunFolder,
    existing: ExistingRun,
    resume_from: Path | None,
    config: TrainConfig,
    splits: Splits,
    schedule: Schedule,
) -> bool:
    """Return whether the folder holds this very run, complete.

    Raises:
        RequestError: If the run there, or the one fetched to be resumed, is another one.
    """
    if existing.settings:
        return _compare(folder, existing, config.to_flat(), splits, schedule)
    if resume_from is not None:
        there, here = read_config(RunFolder(resume_from)), public_settings(config, splits)
        if all(settings["model"].startswith("local-dir:") for settings in (there, here)):
            here["model"] = there["model"]  # it lies elsewhere on another machine; its tensors are compared
        _compare(folder, ExistingRun(settings=there), here, splits, schedule)
    return False


def _compare(
    folder: RunFolder, existing: ExistingRun, now: Mapping[str, Any], splits: Splits, schedule: Schedule
) -> bool:
    """Compare a request with the run in a folder; return whether that run is complete.

    Raises:
        RequestError: If it is another run; the message names the settings that differ.
    """
    before = existing.settings
    fixed = [name for name in now if name not in resumable_fields() | growing_fields()]
    differing = [
        f"{flag_of(name)} is {before.get(name)} there and {now[name]} now"
        for name in fixed
        if before.get(name) != now[name]
    ]
    old_steps = plan_schedule(TrainConfig.from_flat(before), splits.train.count).steps
    if schedule.steps < old_steps:
        differing.append(f"{old_steps} steps there and {schedule.steps} now (--epochs and --max-steps may only grow)")
    if existing.fingerprint not in (None, splits.fingerprint):
        differing.append(f"the images of {splits.dataset_id} have changed")
    if differing:
        raise RequestError(
            f"{folder} holds another run: {'; '.join(differing)}. Choose another --output-dir, or use the same "
            "settings to resume it"
        )
    if existing.steps == schedule.steps and existing.fault is not None:
        if not any(folder.checkpoints.glob("step-*")):
            raise RequestError(f"{existing.fault}, but no checkpoint is left to write it from; train in another folder")
        _logger.warning("%s", existing.fault)
    return existing.steps == schedule.steps and existing.fault is None


def nearest(folder: RunFolder) -> Path:
    """Return the folder, or the closest folder above it that exists."""
    return next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if os.path.exists(path))


def require_writable(folder: RunFolder) -> None:
    """Raise RequestError if the folder cannot be written or created."""
    if not os.access(nearest(folder), os.W_OK | os.X_OK):
        raise RequestError(
            f"the run folder {printable(folder)} is not writable: permission denied; choose another --output-dir"
        )


def _require_usable(folder: RunFolder) -> None:
    """Refuse a run folder that cannot be created, or that holds other things."""
    closest = nearest(folder)
    if not closest.is_dir():
        raise RequestError(
            f"the run folder {folder} cannot be created, as {closest} is a file; choose another --output-dir"
        )
    others = (
        sorted(entry.name for entry in folder.path.iterdir() if entry.name[0] != ".") if folder.path.is_dir() else []
    )
    if others and not folder.is_run:
        raise RequestError(
            f"{folder} holds other files ({listing(others, 3)}) and no run; choose an --output-dir of its own"
        )
