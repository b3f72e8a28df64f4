"""A run's state on the Hub, on a branch beside its model, so that a run outlives its machine."""

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
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import link_or_copy, new_folder
from resnext_hub.hub.remote import commit_files, differing_files, files_under, no_bars, persist
from resnext_hub.models.fetch import HUB_ERRORS, forget_wrong
from resnext_hub.run_folder import RunFolder
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

BRANCH = "checkpoints"
"""The branch that holds the newest checkpoint alone, with what else a run needs to go on."""

LOGS = ("metrics.jsonl", "unreadable-*.jsonl")
"""Files of a run folder that belong to its state."""


class CheckpointPusher:
    """Uploads checkpoints in the background, one at a time; of those that wait, only the newest.

    A failure is said and does not stop the run: the next checkpoint is tried again.

    Args:
        repo_id: The repository; made if it is not there.
        private: Whether to make a new one private.
        settings: The run's configuration as YAML, without paths of this machine.
    """

    def __init__(self, repo_id: str, private: bool, settings: str) -> None:
        self.repo_id, self.private, self.settings = repo_id, private, settings
        self._waiting: tempfile.TemporaryDirectory[str] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def push(self, checkpoint: Path) -> None:
        """Take a checkpoint as it is now, and upload it when those before are done; returns at once."""
        taken = tempfile.TemporaryDirectory(prefix=".partial-push-", dir=checkpoint.parent)
        shutil.copytree(checkpoint, Path(taken.name, checkpoint.name), copy_function=link_or_copy)  # it never changes
        for pattern in LOGS:
            for log in checkpoint.parent.parent.glob(pattern):
                shutil.copy2(log, taken.name)
        Path(taken.name, "config.yaml").write_text(self.settings, "utf-8")
        with self._lock:
            if self._waiting is not None:
                self._waiting.cleanup()
            self._waiting = taken
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def finish(self, seconds: float | None = None) -> None:
        """Wait until everything is uploaded, or for so many seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                _logger.warning("the newest checkpoint has not reached %s yet, and is left to this disk", self.repo_id)

    def _work(self) -> None:
        while True:
            with self._lock:
                taken, self._waiting = self._waiting, None
                if taken is None:
                    self._thread = None
                    return
            with taken as folder:
                try:
                    with no_bars():  # the run has one of its own
                        persist(lambda folder=folder: self._upload(Path(folder)), self.repo_id)  # type: ignore[misc]
                except HUB_ERRORS as error:
                    _logger.warning("a checkpoint did not reach %s: %s; the run goes on", self.repo_id, one_line(error))

    def _upload(self, folder: Path) -> None:
        api = HfApi(library_name="resnext-hub")
        api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        api.create_branch(self.repo_id, branch=BRANCH, exist_ok=True)
        files = files_under(folder)
        if not differing_files(api, self.repo_id, BRANCH, files):
            return  # it landed, though the answer was lost
        head = api.repo_info(self.repo_id, revision=BRANCH).sha
        (step,) = (path.name for path in folder.glob("step-*"))
        listed = api.list_repo_tree(self.repo_id, revision=head, recursive=True)
        old = {entry.path.partition("/")[0] for entry in listed if isinstance(entry, RepoFile)}
        deletions = [
            CommitOperationDelete(f"{name}/", is_folder=True)
            for name in sorted(old)
            if name.startswith("step-") and name != step
        ]
        commit_files(api, self.repo_id, files, f"checkpoint {step}", revision=BRANCH, parent=head, deletions=deletions)


def fetch_run(where: str) -> Path:
    """Download a run's state; return a folder with config.yaml, the logs, and the checkpoint's folder.

    Args:
        where: `hub:owner/name`.

    Raises:
        RequestError: If it is of another form, or the repository holds no checkpoints.
        RunError: If the Hub cannot be reached, or the bytes are not those that it lists.
    """
    kind, colon, repo_id = where.partition(":")
    if kind != "hub" or not colon:
        raise RequestError(f"--resume-from {where}: expected hub:owner/name")
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
            f"--resume-from {where}: there is no such repository with a branch {BRANCH} that you may read; a run makes "
            "one with --push-checkpoints"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"--resume-from {where}: {repo_id} is not of the form owner/name") from error
    except (OfflineModeIsEnabled, *HUB_ERRORS) as error:
        raise RunError(f"--resume-from {where}: the Hub could not be reached: {one_line(error)}") from error
    for name, path in paths.items():
        entry = listed[name]
        if forget_wrong(path, entry.lfs.sha256 if entry.lfs else None, entry.blob_id):
            raise RunError(
                f"--resume-from {where}: {name} has other bytes than the Hub lists; it was removed from the cache, so "
                "that it is fetched anew"
            )
    steps = sorted({name.partition("/")[0] for name in paths if "/" in name})
    if "config.yaml" not in paths or not steps:
        raise RequestError(f"--resume-from {where}: its branch {BRANCH} holds no run")
    return paths["config.yaml"].parent


def fetched_settings(settings: Mapping[str, Any], asked: Container[str], where: str) -> dict[str, Any]:
    """Return those settings of a fetched run that a run on this machine takes over, and say which it does not.

    Where results go and how this machine works are for whoever types the command to say; a folder of another machine
    is not here.

    Args:
        settings: Of the run on the Hub.
        asked: Names of the settings that were asked for here.
        where: The repository as it was typed.

    Raises:
        RequestError: If the dataset or the model was a local folder, and none was asked for.
    """
    model, dataset = str(settings.get("model", "")), str(settings.get("dataset", ""))
    on_the_hub = is_hub_id(dataset) and "/" in dataset and not os.path.lexists(dataset)
    if "dataset" not in asked and dataset != BUNDLED and not on_the_hub:
        raise RequestError(
            f"--resume-from {where}: the run was trained on a dataset called {printable(dataset)}, which may be a "
            "folder; name it with --dataset"
        )
    if "model" not in asked and model.startswith("local-dir:"):
        raise RequestError(
            f"--resume-from {where}: the run started from a local model, {printable(model)}; name it with --model"
        )
    left = sorted(
        name for name in _OF_A_MACHINE if name not in asked and settings.get(name) not in (None, False, "auto")
    )
    if left:
        _logger.warning(
            "not taken from %s: %s; type what you want of it",
            where,
            ", ".join(f"{name}={printable(settings[name])}" for name in left),
        )
    return {name: value for name, value in settings.items() if name not in _OF_A_MACHINE}


_OF_A_MACHINE = frozenset(
    {"push_to_hub", "push_checkpoints", "repo_id", "license", "private", "workers", "log_samples"}
)
"""Settings that a fetched run does not bring along."""

_STATE_FILE = re.compile(
    r"config\.yaml|metrics\.jsonl|unreadable-\d{1,6}\.jsonl|step-\d{8,12}/[a-z]+\.(?:safetensors|json)"
)
"""Names of a run's state on the Hub; no other file is fetched."""


def restore_run(source: Path, folder: RunFolder) -> None:
    """Put a fetched state into a run folder that holds none; the checkpoint comes last, and whole or not at all."""
    for pattern in LOGS:
        for log in source.glob(pattern):
            shutil.copy2(log, folder.path / log.name)
    with new_folder(folder.checkpoints) as aside:
        for step in source.glob("step-*"):
            shutil.copytree(step, aside / step.name)  # of the links in the cache, what they lead to
