"""Publish a model folder to the Hub in one commit, and verify it afterwards."""

import dataclasses
import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from resnext_hub.cards.card_file import CARD_BYTES as CARD_BYTES
from resnext_hub.cards.card_file import CardFile, Kept, choose_kept, put_together, take_apart
from resnext_hub.cards.eval_results import EVAL_RESULTS, eval_results
from resnext_hub.cards.licenses import check_license
from resnext_hub.cards.model_card import TAGS, card_parts, license_conflict
from resnext_hub.errors import RequestError, RunError, hide_tokens, one_line, setting
from resnext_hub.files import read_json, read_regular, sha256_of, write_json
from resnext_hub.hub.remote import commit_files, differing_files, fetch_text, no_bars, persist, status_of
from resnext_hub.models.fetch import HUB_ERRORS, check_revision
from resnext_hub.models.ood import OOD, read_ood
from resnext_hub.models.saved import WEIGHTS
from resnext_hub.models.saved_config import MULTI_LABEL, parse_config
from resnext_hub.record import PLOTS, RunRecord
from resnext_hub.text import listing, printable
from resnext_hub.yaml_files import yaml_fields

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The result of publishing."""

    address: str | None
    """URL of the commit, the pull request, or the repository if nothing changed; None in a dry run."""
    changed: bool
    """Whether anything was committed."""
    files: list[tuple[str, int]]
    """Names of the files, and their sizes in bytes."""


def check_request(record: RunRecord | None, repo_id: str | None, license: str | None) -> tuple[str, str]:
    """Check a request to publish; return the repository and the license.

    Raises:
        RequestError: If the repository ID is missing or invalid, or the license is missing or unknown; there is no
            default license.
    """
    if not repo_id:
        raise RequestError(f"{setting('repo_id')} is required; for example, me/name")
    shown = setting("repo_id", hide_tokens(printable(repo_id))[:120])
    if "hf_" in repo_id and "/" not in repo_id:
        raise RequestError(f"{shown} is a token; expected owner/name (log in with `hf auth login`)")
    if repo_id.count("/") != 1:
        raise RequestError(f"{shown}: expected owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"{shown}: {one_line(error)}") from error
    if not license:
        base = record.base_model if record else None
        hint = (
            f" (license of the base model {printable(base.id)}: {printable(base.license or 'not stated')})"
            if base
            else ""
        )
        raise RequestError(f"{setting('license')} is required; for example, apache-2.0, mit or cc-by-nc-4.0{hint}")
    check_license(license)
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
    overwrite_card: bool = False,
) -> Publication:
    """Upload a model folder with a card for the repository, and compare the uploaded files with the local ones.

    Publishing again is safe: without changes there is no second commit, and if a response was lost, the repository is
    checked for the commit.

    Args:
        folder: The model folder of a run.
        record: The record of the run.
        repo_id: `owner/name`; created if it does not exist.
        license: License of the weights, an ID from the Hub's list.
        private: Whether to create a new repository as private.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to; created if it does not exist.
        dry_run: Whether to only list the files, without any write or request.
        overwrite_card: Whether to replace the README.md on the Hub, and an edited one in the model folder.

    Raises:
        RequestError: If the request is incomplete, the folder does not contain the model of the record, or edits of the
            card would be lost.
        RunError: If the Hub rejects the request, cannot be reached, or returns different bytes.
    """
    repo_id, license = check_request(record, repo_id, license)
    check_revision(setting("revision", revision), revision)
    conflict = license_conflict(record.base_model, license)
    if conflict is not None:
        _logger.warning("check the license: %s", conflict)
    config = require_model(folder, record)
    files = _published_files(folder)
    missing = [name for name in record.plots if f"plots/{name}" not in files]
    if missing:
        _logger.warning(
            "the card does not show all plots, because some are missing from the model folder (%s); %s",
            listing(missing),
            WAY_OUT,
        )
        record = dataclasses.replace(record, plots=[name for name in record.plots if name not in missing])
    here = _card_here(folder, overwrite_card)
    config |= {"pretrained_cfg": config["pretrained_cfg"] | {"license": license}}
    metadata, body = card_parts(record, repo_id, license, config)
    message = f"Upload {record.model.variant or record.model.architecture} trained on {printable(record.dataset.id)}"
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch, "config.json"), config)
        for name, text in eval_results(record).items():
            files[name] = Path(scratch, Path(name).name)
            files[name].write_text(text, "utf-8")
        staged = _Staged(files, Path(scratch), metadata, body, here, overwrite_card)
        staged.write_card(None)
        sizes = [(name, path.stat().st_size) for name, path in sorted(staged.files.items())]
        if dry_run:
            return Publication(address=None, changed=True, files=sizes)
        api = HfApi(library_name="resnext-hub")
        upload = _Upload(api, repo_id, staged, message, private, create_pr, revision)
        try:
            address, where = persist(upload.commit, repo_id)
            wrong = persist(lambda: staged.differing(api, repo_id, where, read_back=True), repo_id)
        except HUB_ERRORS as error:
            raise RunError(
                f"{repo_id} could not be published: {failure_reason(error)}. The model is kept in {folder}; rerun the "
                "same command to publish it"
            ) from error
        sizes = [(name, path.stat().st_size) for name, path in sorted(staged.files.items())]
    if wrong:
        raise RunError(
            f"{repo_id}: the upload differs from the local files ({', '.join(wrong)}). The model is kept in {folder}; "
            "rerun the same command to upload it again"
        )
    return Publication(address=address, changed=upload.sent, files=sizes)


WAY_OUT = "rerun the training command to write the model folder again"
"""What to do about a damaged model folder, for the end of a message."""


def require_model(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return the config.json of a model folder, after checking that it contains the model of a record.

    Raises:
        RequestError: If a file is missing or not a regular file, or differs from the record.
    """
    weights = folder / WEIGHTS
    if weights.is_symlink() or not weights.is_file():
        raise RequestError(f"{printable(weights)} is missing or not a regular file; {WAY_OUT}")
    if sha256_of(weights) != record.model.weights_sha256:
        raise RequestError(f"{printable(weights)} does not match the SHA-256 of the weights in record.json; {WAY_OUT}")
    config = require_config(folder, record)
    sha256 = (config.get("resnext_hub") or {}).get("ood_sha256")
    if sha256 is not None:
        if not (folder / OOD).exists():
            raise RequestError(f"{printable(folder / OOD)} is missing, but config.json contains its hash; {WAY_OUT}")
        read_ood(printable(folder), folder / OOD, sha256)
    return config


def require_config(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return the config.json of a model folder, after checking that it describes the model of a record.

    Raises:
        RequestError: If it is missing, invalid, or differs from the record.
    """
    path = folder / "config.json"
    if path.is_symlink() or not path.is_file():
        raise RequestError(f"{printable(path)} is missing or not a regular file; {WAY_OUT}")
    config = read_json(path, dict[str, Any], WAY_OUT)
    _check_config(config, record, printable(folder))
    return config


def _published_files(folder: Path) -> dict[str, Path]:
    """Return the weights and plots of a model folder by their names in the repository; log all other files."""
    plots = [] if (folder / "plots").is_symlink() else [folder / "plots" / name for name in PLOTS]
    known = {path for path in (folder / WEIGHTS, folder / OOD, *plots) if path.is_file() and not path.is_symlink()}
    generated = {folder / "config.json", folder / "README.md", folder / "plots", folder / EVAL_RESULTS}
    others = [
        path.relative_to(folder).as_posix()
        for path in sorted([*folder.iterdir(), *(folder / "plots").glob("*")])
        if path not in known | generated
    ]
    if others:
        _logger.warning("ignoring files that are not part of the model: %s", listing(others))
    return {path.relative_to(folder).as_posix(): path for path in sorted(known)}


_CONFIG_KEYS = frozenset(
    {"architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg"}
    | {"resnext_hub", "problem_type"}
)


def _check_config(config: Mapping[str, Any], record: RunRecord, where: str) -> None:
    """Raise RequestError unless a config.json is as training wrote it, without keys that would load other code."""
    unknown = sorted(config.keys() - _CONFIG_KEYS)
    if unknown:
        raise RequestError(f"{where}: config.json has unexpected keys: {listing(unknown)}; {WAY_OUT}")
    parse_config(dict(config), where)
    cfg, labels, facts = config["pretrained_cfg"], record.evaluation.labels, config.get("resnext_hub") or {}
    for name, found, expected in (
        ("architecture", config["architecture"], record.model.architecture),
        ("label_names", config.get("label_names"), record.label_names),
        ("problem_type", config.get("problem_type"), MULTI_LABEL if labels is not None else None),
        (
            "resnext_hub.thresholds",
            facts.get("thresholds"),
            None if labels is None else [label.threshold for label in labels],
        ),
        ("resnext_hub.tta", facts.get("tta", "none"), record.config.get("tta", "none")),
        ("model_args", config.get("model_args") or {}, record.model.model_args),
        *((f"pretrained_cfg.{name}", cfg.get(name), value) for name, value in record.model.input.items()),
    ):
        if found != expected:
            raise RequestError(f"{where}: {name} differs between config.json and record.json; {WAY_OUT}")


def _card_here(folder: Path, overwrite: bool) -> CardFile | None:
    """Return the card of the model folder, for the edits of its owner, or None if it is missing or to be replaced.

    Raises:
        RequestError: If it cannot be read and must not be overwritten.
    """
    path = folder / "README.md"
    if not os.path.lexists(path):
        return None
    try:
        card = take_apart(read_regular(path, CARD_BYTES).decode(), TAGS)
    except (OSError, ValueError) as error:
        if overwrite:
            return None
        raise RequestError(
            f"{printable(path)} cannot be read ({one_line(error)}); fix it, or replace it with "
            f"{setting('overwrite_card', True)}"
        ) from error
    return None if overwrite and card.foreign else card


class _Staged:
    """The files of an upload by name; the card is rewritten for each attempt, to keep edits made on the Hub."""

    def __init__(
        self,
        files: Mapping[str, Path],
        scratch: Path,
        metadata: str,
        body: str,
        here: CardFile | None,
        overwrite_card: bool,
    ) -> None:
        self._metadata, self._body, self._here, self.overwrite_card = metadata, body, here, overwrite_card
        self._card = scratch / "README.md"
        self.files = {**files, "README.md": self._card, "config.json": scratch / "config.json"}
        self.absent = {OOD, *(f"plots/{name}" for name in PLOTS)} - self.files.keys()
        """Files of a model that this one does not have; an earlier publication may have left them."""

    def differing(self, api: HfApi, repo_id: str, revision: str, read_back: bool = False) -> list[str]:
        """Return the names of files that differ in a revision; see `differing_files`."""
        return differing_files(api, repo_id, revision, self.files, read_back, absent=sorted(self.absent))

    def write_card(self, there: str | None) -> None:
        """Write the card, with the edits of its owner in the model folder and on the Hub.

        Args:
            there: The card on the Hub, if there is one.

        Raises:
            RequestError: If an edit would be lost.
        """
        own = set(yaml_fields(self._metadata))
        try:
            card = None if there is None else take_apart(there, TAGS)
            kept = choose_kept(self._here, card, own)
        except ValueError as error:
            here = self._here.kept if self._here else Kept()
            _log_difference(there or "", put_together(self._metadata, self._body, here))
            raise RequestError(
                f"{one_line(error)}; nothing was uploaded. Move the edits above or below the generated part, or "
                f"replace the card with {setting('overwrite_card', True)}"
            ) from error
        self._card.write_text(put_together(self._metadata, self._body, kept), "utf-8")


def open_repository(repo_id: str, private: bool) -> None:
    """Create a repository if needed and check the permission to write to it, before training for it.

    Raises:
        RunError: If the Hub rejects the request or cannot be reached.
    """
    api = HfApi(library_name="resnext-hub")
    try:
        persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    except HUB_ERRORS as error:
        raise RunError(
            f"cannot write to {repo_id}: {failure_reason(error)}. Training was not started; without "
            f"{setting('push_to_hub', True)} and {setting('push_checkpoints', True)} the run is only saved locally, "
            "and `resnext-hub push` can publish it later"
        ) from error


class _Upload:
    """An upload that can be retried: each attempt first checks the state of the repository."""

    def __init__(
        self, api: HfApi, repo_id: str, staged: _Staged, message: str, private: bool, create_pr: bool, revision: str
    ) -> None:
        self.api, self.repo_id, self.staged, self.message = api, repo_id, staged, message
        self.private, self.create_pr, self.revision = private, create_pr, revision
        self.sent = False

    def commit(self) -> tuple[str, str]:
        """Commit unless an earlier attempt succeeded; return the URL of the commit and its revision."""
        api, repo_id = self.api, self.repo_id
        api.create_repo(repo_id, private=self.private, exist_ok=True)
        if self.revision != "main":
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        head = api.repo_info(repo_id, revision=self.revision).sha or self.revision
        there = None if self.staged.overwrite_card else fetch_text(repo_id, "README.md", head, CARD_BYTES)
        self.staged.write_card(there)
        differing = self.staged.differing(api, repo_id, head)
        if not differing:
            return f"{api.endpoint}/{repo_id}", head
        if self.create_pr and (pull := self._open_pull()):
            return pull
        self.sent = True
        with nullcontext() if sys.stderr.isatty() else no_bars():
            commit = commit_files(
                api,
                repo_id,
                self.staged.files,
                self.message,
                revision=self.revision,
                parent=head,
                create_pr=self.create_pr,
                deletions=[CommitOperationDelete(name) for name in differing if name in self.staged.absent],
            )
        if self.create_pr:
            return str(commit.pr_url), str(commit.pr_revision)
        return commit.commit_url, commit.oid

    def _open_pull(self) -> tuple[str, str] | None:
        """Return the URL and revision of an open pull request with the same files, if there is one."""
        pulls = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
        for pull in pulls:
            revision = f"refs/pr/{pull.num}"
            if pull.title == self.message and not self.staged.differing(self.api, self.repo_id, revision):
                return pull.url, revision
        return None


def _log_difference(old: str, new: str, most: int = 40) -> None:
    """Log the difference between two cards."""
    lines = [
        line
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), "card on the Hub", "new card", lineterm="")
        if not line.startswith("@@")
    ]
    more = [f"… and {len(lines) - most} more lines"] if len(lines) > most else []
    _logger.warning("%s", "\n".join(printable(line)[:200] for line in [*lines[:most], *more]))


def failure_reason(error: Exception) -> str:
    """Return why the Hub refused, with what to do about it."""
    status = status_of(error)
    if status == 401:
        return "the token is missing or invalid; log in with `hf auth login`"
    if status == 403:
        return f"permission denied: the token cannot write there ({one_line(error)})"
    return one_line(error)
