"""From a model folder to a repository on the Hub: one commit, read back after it."""

import json
import logging
import re
import shutil
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import write_json
from resnext_hub.hub.card import license_conflict, render_card
from resnext_hub.hub.remote import HUB_ERRORS, commit_folder, differing_files, no_bars, persist, status_of
from resnext_hub.models.source import WEIGHTS
from resnext_hub.record import RunRecord

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What publishing did."""

    address: str | None
    """Of the commit, the pull request, or the repository if nothing had changed; None in a dry run."""
    changed: bool
    """Whether there was anything to commit."""
    files: list[tuple[str, int]]
    """Names and sizes in bytes."""


def check_request(record: RunRecord | None, repo_id: str | None, license: str | None) -> tuple[str, str]:
    """Refuse a request to publish that says too little; give the repository and the licence.

    Raises:
        RequestError: If the id is none, or there is no licence: it is asked for, never assumed.
    """
    if not repo_id:
        raise RequestError("--repo-id is needed, such as me/name")
    if repo_id.count("/") != 1:
        raise RequestError(f"--repo-id {repo_id}: expected owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"--repo-id {repo_id}: {error}") from error
    if not license:
        base = record.base_model if record else None
        hint = (
            f" (the weights that training started from, {base.id}, have {base.license or 'none stated'})"
            if base
            else ""
        )
        raise RequestError(f"--license is needed, such as apache-2.0, mit or cc-by-nc-4.0{hint}")
    if not re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9]+)*", license):
        raise RequestError(f"--license {license}: expected an id of the Hub's list, such as apache-2.0 or mit")
    return repo_id, license


def publish(
    folder: Path,
    record: RunRecord,
    repo_id: str | None,
    license: str | None,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    dry_run: bool = False,
) -> Publication:
    """Upload a model folder with its card made out for the repository, and compare what the Hub holds then.

    It is safe to repeat: where nothing has changed there is no second commit, and if an answer was lost, the
    repository is asked whether the commit has landed.

    Args:
        folder: The model folder of a run.
        record: The run's record.
        repo_id: `owner/name`; created if it is not there.
        license: Licence of the weights, an id of the Hub's list.
        private: Create the repository as a private one.
        create_pr: Open a pull request instead of committing.
        revision: Branch to commit to, made if it is not there.
        dry_run: Touch nothing and reach for nothing.

    Raises:
        RequestError: If there is nothing to publish, the id is no id, or there is no licence.
        RunError: If the Hub refuses, cannot be reached, or holds other bytes in the end.
    """
    if not (folder / WEIGHTS).is_file():
        raise RequestError(f"{folder} holds no {WEIGHTS}: there is nothing to publish")
    repo_id, license = check_request(record, repo_id, license)
    conflict = license_conflict(record.base_model, license)
    if conflict:
        _logger.warning("--license %s: %s", license, conflict)
    message = f"{record.model.variant or record.model.architecture} trained on {record.dataset.id}"
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch, "model")
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(".*"))
        (staged / "README.md").write_text(render_card(record, repo_id, license))
        config = json.loads((staged / "config.json").read_text())
        config["pretrained_cfg"]["license"] = license
        write_json(staged / "config.json", config)
        files = [(p.relative_to(staged).as_posix(), p.stat().st_size) for p in sorted(staged.rglob("*")) if p.is_file()]
        if dry_run:
            return Publication(address=None, changed=True, files=files)
        api = HfApi(library_name="resnext-hub")
        upload = _Upload(api, repo_id, staged, message, private, create_pr, revision)
        try:
            address, where = persist(upload.commit, repo_id)
            wrong = persist(lambda: differing_files(api, repo_id, where, staged, read_back=True), repo_id)
        except HUB_ERRORS as error:
            raise RunError(
                f"{repo_id} could not be published: {_reason(error)}. Everything is kept in {folder}; the same command "
                "goes on"
            ) from error
    if wrong:
        raise RunError(
            f"{repo_id} holds other bytes than were sent of {', '.join(wrong)}; all is kept in {folder}, and the "
            "same command sends them again"
        )
    return Publication(address=address, changed=upload.sent, files=files)


def open_repository(repo_id: str, private: bool) -> None:
    """Make sure of a repository and the right to write to it, before anything is computed for it.

    Raises:
        RunError: If the Hub refuses or cannot be reached.
    """
    api = HfApi(library_name="resnext-hub")
    try:
        persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    except HUB_ERRORS as error:
        raise RunError(
            f"{repo_id} cannot be written to: {_reason(error)}. Nothing was computed; without --push-to-hub and "
            "--push-checkpoints the run stays on this disk, and scripts/push.py publishes it later"
        ) from error


class _Upload:
    """One upload, as often tried as it takes; each attempt begins by asking what is there."""

    def __init__(
        self, api: HfApi, repo_id: str, staged: Path, message: str, private: bool, create_pr: bool, revision: str
    ) -> None:
        self.api, self.repo_id, self.staged, self.message = api, repo_id, staged, message
        self.private, self.create_pr, self.revision = private, create_pr, revision
        self.sent = False

    def commit(self) -> tuple[str, str]:
        """Give the address of what was committed, now or by an attempt before, and its revision."""
        api, repo_id = self.api, self.repo_id
        api.create_repo(repo_id, private=self.private, exist_ok=True)
        if self.revision != "main":
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        head = api.repo_info(repo_id, revision=self.revision).sha or self.revision
        if not differing_files(api, repo_id, head, self.staged):
            return f"{api.endpoint}/{repo_id}", head
        if self.create_pr and (pull := self._open_pull()):
            return pull
        self.sent = True
        with nullcontext() if sys.stderr.isatty() else no_bars():
            commit = commit_folder(
                api, repo_id, self.staged, self.message, revision=self.revision, parent=head, create_pr=self.create_pr
            )
        if self.create_pr:
            return str(commit.pr_url), str(commit.pr_revision)
        return commit.commit_url, commit.oid

    def _open_pull(self) -> tuple[str, str] | None:
        """Find a pull request that says the same already."""
        pulls = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
        for pull in pulls:
            revision = f"refs/pr/{pull.num}"
            if pull.title == self.message and not differing_files(self.api, self.repo_id, revision, self.staged):
                return pull.url, revision
        return None


def _reason(error: Exception) -> str:
    status = status_of(error)
    if status == 401:
        return "the Hub does not accept the token, or there is none; log in with `hf auth login`"
    if status == 403:
        return f"your token may not write there ({one_line(error)})"
    return one_line(error)
