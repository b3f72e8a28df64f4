"""Inspect an existing run folder: does it hold a run, is it finished, and is it the requested run?"""

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_hub.data.config import NO_TEST
from resnext_hub.data.splits import Splits
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.hub.publish import WAY_OUT, require_model
from resnext_hub.processes.peers import Peers
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.public import public_settings
from resnext_hub.text import listing, printable
from resnext_hub.training.balance import Balance, digest_of
from resnext_hub.training.checkpoint import latest_step
from resnext_hub.training.config import TrainConfig, fixed_settings, growing_fields, resumable_fields
from resnext_hub.training.schedule import Schedule, plan_schedule
from resnext_hub.yaml_files import read_yaml

_logger = logging.getLogger(__name__)

CONFIG_VERSION = 1
"""Format version of config.yaml; files of versions before 0.3 do not state it and have version 1."""

_BEFORE = {
    "test_split": NO_TEST,
    "group_duplicates": False,
    "best_by": "top1",
    "loss": "cross-entropy",
    "label_smoothing": 0.1,
}
"""What runs of earlier versions did, where it differs from today's default; their files do not state it."""

_LAST_SETTING = "private"
"""The last setting in config.yaml since the first release; a file without it is truncated."""


@dataclass(frozen=True, kw_only=True)
class ExistingRun:
    """Content of a run folder; with several hosts, that of the main process."""

    settings: dict[str, Any]
    """Flat settings of the run; empty if there is no run."""
    steps: int | None = None
    """Steps of the run, if it is finished; those that were planned if it stopped early."""
    fingerprint: str | None = None
    """Fingerprint of the dataset, if the run is finished."""
    state: tuple[str | None, ...] = ()
    """`RunFolder.state` at the time of reading."""
    class_weights: str | None = None
    """Digest of the class weights, if the run is finished."""
    fault: str | None = None
    """Why the model folder does not match the record, if it does not."""


def read_existing(folder: RunFolder) -> ExistingRun:
    """Read an existing run folder; nothing is created.

    Raises:
        RequestError: If the path cannot be a run folder, or the run in it cannot be read.
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
        fault = str(error).removesuffix(f"; {WAY_OUT}")
    return ExistingRun(
        settings=settings,
        steps=record.steps if record.planned_steps is None else record.planned_steps,
        fingerprint=record.dataset.fingerprint,
        class_weights=digest_of(record.class_weights),
        state=state,
        fault=fault,
    )


def read_config(folder: RunFolder) -> dict[str, Any]:
    """Return the flat settings in the config.yaml of a folder; empty if there is no such file.

    Raises:
        RequestError: If the file is damaged, or of a newer format version.
    """
    path = folder.config
    if not os.path.lexists(path):
        return {}
    remedy = f"restore the file, or choose another {setting('output_dir')}"
    content = read_yaml(path, remedy)
    version = content.pop("format_version", CONFIG_VERSION)
    if version != CONFIG_VERSION or isinstance(version, bool):
        raise RequestError(
            f"{printable(path)} has format version {printable(version)[:40]}; this version of resnext-hub reads "
            f"version {CONFIG_VERSION}; update resnext-hub, or choose another {setting('output_dir')}"
        )
    try:
        TrainConfig.from_flat(content)
    except RequestError as error:
        raise RequestError(f"{printable(path)} is damaged ({one_line(error)}); {remedy}") from error
    if _LAST_SETTING not in content:
        raise RequestError(f"{printable(path)} is truncated (the last settings are missing); {remedy}")
    return TrainConfig().to_flat() | _BEFORE | content


def is_finished(
    folder: RunFolder,
    existing: ExistingRun,
    resume_from: Path | None,
    config: TrainConfig,
    splits: Splits,
    balance: Balance,
    schedule: Schedule,
) -> bool:
    """Return whether the folder holds the requested run, complete.

    Raises:
        RequestError: If the run in the folder, or the fetched one to resume, is another run.
    """
    if existing.settings:
        if existing.steps is not None and existing.class_weights != balance.digest:
            raise RequestError(
                f"{printable(folder)} contains a different run: its class weights have changed. Choose another "
                f"{setting('output_dir')}, or use the same weights"
            )
        return _compare(folder, existing, config.to_flat(), splits, schedule)
    if resume_from is not None:
        fetched, requested = read_config(RunFolder(resume_from)), public_settings(config, splits)
        if all(settings["model"].startswith("local-dir:") for settings in (fetched, requested)):
            requested["model"] = fetched["model"]  # its path may differ between machines; tensors are compared
        _compare(folder, ExistingRun(settings=fetched), requested, splits, schedule)
    return False


def require_run_on_main_host(folder: RunFolder, config: TrainConfig, peers: Peers) -> None:
    """Check that no other host has got further with this run than the host of the main process.

    The main process may be on another host than before, since some launchers order hosts by name. It would silently
    repeat steps, or start from scratch.

    Raises:
        RequestError: In every process, if another host has got further.
    """
    if peers.size == 1:
        return
    step = peers.together(lambda: _step_of(folder, config))
    (main_host, main_step), *others = peers.gather((platform.node(), step))
    host, furthest = max(others, key=lambda found: found[1])
    if furthest > main_step:
        has = f"has only step {main_step}" if main_step else "has none"
        raise RequestError(
            f"host {printable(host)} has a later checkpoint of this run in {printable(folder)}, at step {furthest}, "
            f"but host {printable(main_host)} (rank 0) {has}; give rank 0 to {printable(host)}, copy the run folder "
            "from there, or remove it there to repeat those steps"
        )


def _step_of(folder: RunFolder, config: TrainConfig) -> int:
    """Return the step of the newest checkpoint of a run in a folder of this host; 0 if the folder does not hold it."""
    try:
        before = read_config(folder)
    except RequestError:
        return 0
    settings = fixed_settings(config)
    settings.pop("class_weights", None)  # a file may have another path on another host
    same = all(before.get(name) == value for name, value in settings.items())
    return latest_step(folder.checkpoints) if same else 0


def _compare(
    folder: RunFolder, existing: ExistingRun, now: Mapping[str, Any], splits: Splits, schedule: Schedule
) -> bool:
    """Compare the requested run with the one in a folder; return whether the latter is complete.

    Raises:
        RequestError: If they differ; the message names the settings that differ.
    """
    before = existing.settings
    fixed = [name for name in now if name not in resumable_fields() | growing_fields()]
    if before["streaming"] and before["lanes"] is None:  # a version without lanes
        if existing.steps != schedule.steps:
            raise RequestError(
                f"{printable(folder)} contains a run of an earlier version, which read its stream in a different "
                f"order, so it cannot be resumed; choose another {setting('output_dir')}"
            )
        fixed.remove("lanes")
    if all(settings.get("class_weights") not in ("auto", "none", None) for settings in (before, now)):
        fixed.remove("class_weights")  # a file may have moved; its content is compared
    differing = [
        f"{setting(name)} was {printable(before.get(name))} and is now {printable(now[name])}"
        for name in fixed
        if before.get(name) != now[name]
    ]
    old_steps = plan_schedule(TrainConfig.from_flat(before), splits.train.count).steps
    if schedule.steps < old_steps:
        differing.append(
            f"it has {old_steps} steps, but this command asks for {schedule.steps} ({setting('epochs')} and "
            f"{setting('max_steps')} may only be increased)"
        )
    if existing.fingerprint not in (None, splits.fingerprint):
        differing.append(f"the images of {splits.dataset_id} have changed")
    if differing:
        raise RequestError(
            f"{printable(folder)} contains a different run: {'; '.join(differing)}. Choose another "
            f"{setting('output_dir')}, or use the same settings to resume it"
        )
    if existing.steps == schedule.steps and existing.fault is not None:
        if not any(folder.checkpoints.glob("step-*")):
            raise RequestError(
                f"{existing.fault}, but no checkpoint is left to restore it from; choose another "
                f"{setting('output_dir')}"
            )
        _logger.warning("%s; writing the model folder again", existing.fault)
    return existing.steps == schedule.steps and existing.fault is None


def nearest(folder: RunFolder) -> Path:
    """Return the folder, or the closest folder above it that exists."""
    return next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if os.path.exists(path))


def require_writable(folder: RunFolder) -> None:
    """Raise RequestError if the folder cannot be written or created."""
    if not os.access(nearest(folder), os.W_OK | os.X_OK):
        raise RequestError(
            f"the run folder {printable(folder)} is not writable: permission denied; choose another "
            f"{setting('output_dir')}"
        )


def _require_usable(folder: RunFolder) -> None:
    """Raise RequestError if the run folder cannot be created, or holds other files."""
    closest = nearest(folder)
    if not closest.is_dir():
        raise RequestError(
            f"the run folder {printable(folder)} cannot be created, because {printable(closest)} is a file; choose "
            f"another {setting('output_dir')}"
        )
    others = (
        sorted(entry.name for entry in folder.path.iterdir() if entry.name[0] != ".") if folder.path.is_dir() else []
    )
    if others and not folder.is_run:
        raise RequestError(
            f"{printable(folder)} contains other files ({listing(others, 3)}) but no run; choose an empty or new "
            f"{setting('output_dir')}"
        )
