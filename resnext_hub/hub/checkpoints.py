"""Push the checkpoints of a run to a branch on the Hub, and resume from there on another machine."""

import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from resnext_hub.data.sources.digits import BUNDLED
from resnext_hub.data.sources.hub import is_hub_id
from resnext_hub.data.sources.urls import is_url
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.files import link_or_copy, new_folder
from resnext_hub.hub.remote import commit_files, differing_files, files_under, no_bars, persist
from resnext_hub.models.fetch import HUB_ERRORS, forget_wrong
from resnext_hub.run_folder import RunFolder
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

BRANCH = "checkpoints"
"""Branch with the newest checkpoint, and everything else that is needed to resume the run."""

LOGS = ("metrics.jsonl", "unreadable-*.jsonl")
"""Logs of a run folder that are part of its state."""


class CheckpointPusher:
    """Uploads checkpoints in the background, one at a time; only the newest is worth the upload.

    A newer checkpoint replaces one that is waiting, and one whose upload failed and would be retried. The branch holds
    one checkpoint and no history, so the storage of older ones is freed. A failure is logged and does not stop the run;
    the next checkpoint is uploaded as usual.

    Args:
        repo_id: The repository; created if it does not exist.
        private: Whether to create it as a private repository.
        settings: Configuration of the run as YAML, without local paths.
    """

    def __init__(self, repo_id: str, private: bool, settings: str) -> None:
        self.repo_id, self.private, self.settings = repo_id, private, settings
        self._waiting: tempfile.TemporaryDirectory[str] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def push(self, checkpoint: Path) -> None:
        """Schedule the upload of a checkpoint as it is now, and return immediately."""
        snapshot = tempfile.TemporaryDirectory(prefix=".partial-push-", dir=checkpoint.parent)
        shutil.copytree(
            checkpoint, Path(snapshot.name, checkpoint.name), copy_function=link_or_copy
        )  # checkpoints never change
        for pattern in LOGS:
            for log in checkpoint.parent.parent.glob(pattern):
                shutil.copy2(log, snapshot.name)
        Path(snapshot.name, "config.yaml").write_text(self.settings, "utf-8")
        with self._lock:
            if self._waiting is not None:
                self._waiting.cleanup()
            self._waiting = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def finish(self, seconds: float | None = None) -> None:
        """Wait until everything is uploaded, or for at most `seconds`."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                _logger.warning(
                    "the latest checkpoint was not completely uploaded to %s; it is only saved locally", self.repo_id
                )

    def _work(self) -> None:
        while True:
            with self._lock:
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    self._thread = None
                    return
            with snapshot as folder:
                try:
                    with no_bars():  # the run draws its own
                        # mypy cannot infer the type of a lambda with a default
                        persist(lambda folder=folder: self._upload(Path(folder)), self.repo_id)  # type: ignore[misc]
                except HUB_ERRORS as error:
                    _logger.warning(
                        "a checkpoint could not be uploaded to %s: %s; training continues",
                        self.repo_id,
                        one_line(error),
                    )

    def _upload(self, folder: Path) -> None:
        """Replace the content of the branch by a folder, unless a newer checkpoint is waiting; may be repeated."""
        if self._waiting is not None:
            return
        api = HfApi(library_name="resnext-hub")
        api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        api.create_branch(self.repo_id, branch=BRANCH, exist_ok=True)
        (step,) = (path.name for path in folder.glob("step-*"))
        files = files_under(folder)
        if differing_files(api, self.repo_id, BRANCH, files):  # otherwise only the response of an attempt was lost
            self._commit(api, step, files)
        try:
            api.super_squash_history(self.repo_id, branch=BRANCH, commit_message=f"checkpoint {step}")
        except HUB_ERRORS as error:  # the checkpoint is uploaded, and the next one frees the storage as well
            _logger.warning(
                "the storage of older checkpoints in %s could not be freed: %s", self.repo_id, one_line(error)
            )

    def _commit(self, api: HfApi, step: str, files: Mapping[str, Path]) -> None:
        """Upload the files of a checkpoint and remove other checkpoints, in one commit."""
        head = api.repo_info(self.repo_id, revision=BRANCH).sha
        listed = api.list_repo_tree(self.repo_id, revision=head, recursive=True)
        old = {entry.path.partition("/")[0] for entry in listed if isinstance(entry, RepoFile)}
        deletions = [
            CommitOperationDelete(f"{name}/", is_folder=True)
            for name in sorted(old)
            if name.startswith("step-") and name != step
        ]
        commit_files(api, self.repo_id, files, f"checkpoint {step}", revision=BRANCH, parent=head, deletions=deletions)


def fetch_run(where: str) -> Path:
    """Download the state of a run; return a folder with config.yaml, the logs, and the checkpoint folder.

    Args:
        where: `hub:owner/name`.

    Raises:
        RequestError: If `where` is malformed, or the repository contains no checkpoints.
        RunError: If the Hub cannot be reached, or a file does not match its hash on the Hub.
    """
    asked = setting("resume_from", where)
    kind, colon, repo_id = where.partition(":")
    if kind != "hub" or not colon:
        raise RequestError(f"{asked}: expected hub:owner/name")
    api = HfApi(library_name="resnext-hub")
    try:
        head = api.repo_info(repo_id, revision=BRANCH).sha
        listed = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, revision=head, recursive=True)
            if isinstance(entry, RepoFile) and _STATE_FILE.fullmatch(entry.path)
        }
        paths = {
            name: Path(hf_hub_download(repo_id, name, revision=head, library_name="resnext-hub")) for name in listed
        }
    except (RevisionNotFoundError, RepositoryNotFoundError) as error:
        raise RequestError(
            f"{asked}: the repository or its branch {BRANCH} does not exist, or is private; train with "
            f"{setting('push_checkpoints', True)} to create it, or log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"{asked}: {printable(repo_id)} is not of the form owner/name") from error
    except (OfflineModeIsEnabled, *HUB_ERRORS) as error:
        raise RunError(f"{asked}: the Hub could not be reached: {one_line(error)}") from error
    for name, path in paths.items():
        entry = listed[name]
        if forget_wrong(path, entry.lfs.sha256 if entry.lfs else None, entry.blob_id):
            raise RunError(
                f"{asked}: {name} does not match its hash on the Hub; it was removed from the cache, so rerun the same "
                "command to download it again"
            )
    steps = sorted({name.partition("/")[0] for name in paths if "/" in name})
    if "config.yaml" not in paths or not steps:
        raise RequestError(f"{asked}: the branch {BRANCH} contains no checkpoint")
    return paths["config.yaml"].parent


def fetched_settings(settings: Mapping[str, Any], asked: Container[str], where: str) -> dict[str, Any]:
    """Return the settings of a fetched run that apply on this machine, and log those that do not.

    Where to publish and how to use the machine are not inherited, and a folder of the other machine may not exist here.

    Args:
        settings: Settings of the run on the Hub.
        asked: Names of the settings that were given for this run.
        where: `hub:owner/name`.

    Raises:
        RequestError: If the dataset or the model was a local folder, and none was given for this run.
    """
    model, dataset = str(settings.get("model", "")), str(settings.get("dataset", ""))
    on_the_hub = is_hub_id(dataset) and "/" in dataset and not os.path.lexists(dataset)
    elsewhere = on_the_hub or is_url(dataset) or dataset == BUNDLED
    if "dataset" not in asked and not elsewhere:
        raise RequestError(
            f"{setting('resume_from', where)}: the dataset {printable(dataset)} of that run may be a local folder; "
            f"pass its path as {setting('dataset')}"
        )
    if "model" not in asked and model.startswith("local-dir:"):
        raise RequestError(
            f"{setting('resume_from', where)}: the run started from a local model, {printable(model)}; pass its path "
            f"as {setting('model')}"
        )
    ignored = sorted(
        name for name in _NOT_INHERITED if name not in asked and settings.get(name) not in (None, False, "auto")
    )
    if ignored:
        _logger.warning(
            "ignoring these settings of %s: %s; pass those that you need",
            where,
            ", ".join(f"{name}={printable(settings[name])}" for name in ignored),
        )
    return {name: value for name, value in settings.items() if name not in _NOT_INHERITED}


_NOT_INHERITED = frozenset(
    {"push_to_hub", "push_checkpoints", "repo_id", "license", "private", "workers", "log_samples", "track"}
)
"""Settings that are not taken from a fetched run."""

_STATE_FILE = re.compile(
    r"config\.yaml|metrics\.jsonl|unreadable-\d{1,6}\.jsonl|step-\d{8,12}/[a-z]+\.(?:safetensors|json)"
)
"""Names of the files of a run's state; no other file is downloaded."""


def restore_run(source: Path, folder: RunFolder) -> None:
    """Copy a fetched state to a run folder that has none; the checkpoint is copied last, and atomically."""
    for pattern in LOGS:
        for log in source.glob(pattern):
            shutil.copy2(log, folder.path / log.name)
    with new_folder(folder.checkpoints) as aside:
        for step in source.glob("step-*"):
            shutil.copytree(step, aside / step.name)  # follows the links of the cache
