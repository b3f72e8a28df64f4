"""From a model folder to a repository on the Hub: one commit, read back after it."""

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

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from resnext_hub.cards.card_file import CardFile, Kept, choose_kept, put_together, take_apart
from resnext_hub.cards.licenses import check_license
from resnext_hub.cards.model_card import TAGS, card_parts, license_conflict
from resnext_hub.errors import RequestError, RunError, hide_tokens, one_line
from resnext_hub.files import read_json, read_regular, sha256_of, write_json
from resnext_hub.hub.remote import commit_files, differing_files, fetch_text, no_bars, persist, status_of
from resnext_hub.models.fetch import HUB_ERRORS, check_revision
from resnext_hub.models.saved import WEIGHTS
from resnext_hub.models.saved_config import parse_config
from resnext_hub.record import PLOTS, RunRecord
from resnext_hub.text import listing, printable
from resnext_hub.yaml_files import yaml_fields

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
    said = hide_tokens(printable(repo_id))[:120]
    if "hf_" in repo_id and "/" not in repo_id:
        raise RequestError(f"--repo-id {said} is a token: expected owner/name; log in with `hf auth login`")
    if repo_id.count("/") != 1:
        raise RequestError(f"--repo-id {said}: expected owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"--repo-id {said}: {one_line(error)}") from error
    if not license:
        base = record.base_model if record else None
        hint = (
            f" (the weights that training started from, {printable(base.id)}, have "
            f"{printable(base.license or 'none stated')})"
            if base
            else ""
        )
        raise RequestError(f"--license is needed, such as apache-2.0, mit or cc-by-nc-4.0{hint}")
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
        overwrite_card: Whether the README.md on the Hub, and one here that is not as it was written, may be lost.

    Raises:
        RequestError: If the request says too little, the folder does not hold the model of the record, or words that
            somebody wrote into the card would be lost.
        RunError: If the Hub refuses, cannot be reached, or gives back other bytes.
    """
    repo_id, license = check_request(record, repo_id, license)
    check_revision(f"--revision {printable(revision)}", revision)
    conflict = license_conflict(record.base_model, license)
    if conflict is not None:
        _logger.warning("mind the licence: %s", conflict)
    config = require_model(folder, record)
    files = _published_files(folder)
    missing = [name for name in record.plots if f"plots/{name}" not in files]
    if missing:
        _logger.warning("the card shows no %s, which is missing: %s", listing(missing), WAY_OUT)
        record = dataclasses.replace(record, plots=[name for name in record.plots if name not in missing])
    here = _card_here(folder, overwrite_card)
    metadata, body = card_parts(record, repo_id, license)
    message = f"Upload {record.model.variant or record.model.architecture} trained on {printable(record.dataset.id)}"
    with tempfile.TemporaryDirectory() as scratch:
        write_json(
            Path(scratch, "config.json"), config | {"pretrained_cfg": config["pretrained_cfg"] | {"license": license}}
        )
        staged = _Staged(files, Path(scratch), metadata, body, here, overwrite_card)
        staged.join(None)
        sizes = [(name, path.stat().st_size) for name, path in sorted(staged.files.items())]
        if dry_run:
            return Publication(address=None, changed=True, files=sizes)
        api = HfApi(library_name="resnext-hub")
        upload = _Upload(api, repo_id, staged, message, private, create_pr, revision)
        try:
            address, where = persist(upload.commit, repo_id)
            wrong = persist(lambda: differing_files(api, repo_id, where, staged.files, read_back=True), repo_id)
        except HUB_ERRORS as error:
            raise RunError(
                f"{repo_id} could not be published: {_reason(error)}. Everything is kept in {folder}; the same command "
                "goes on"
            ) from error
        sizes = [(name, path.stat().st_size) for name, path in sorted(staged.files.items())]
    if wrong:
        raise RunError(
            f"{repo_id} holds other bytes than were sent of {', '.join(wrong)}; all is kept in {folder}, and the "
            "same command sends them again"
        )
    return Publication(address=address, changed=upload.sent, files=sizes)


CARD_BYTES = 1 << 20
"""Size in bytes above which a README.md is not read."""


WAY_OUT = "the command that trained the run writes the model folder anew"


def require_model(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return the config.json of a model folder that holds the model of a record.

    Raises:
        RequestError: If it does not: a file is missing or no regular one, or weights or config.json are other ones.
    """
    weights = folder / WEIGHTS
    if weights.is_symlink() or not weights.is_file():
        raise RequestError(f"{printable(weights)} is missing, or not a regular file; {WAY_OUT}")
    if sha256_of(weights) != record.model.weights_sha256:
        raise RequestError(
            f"{printable(weights)} does not hold the weights that record.json and the card describe; {WAY_OUT}"
        )
    return require_config(folder, record)


def require_config(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return the config.json of a model folder, which describes the model of a record.

    Raises:
        RequestError: If it does not.
    """
    path = folder / "config.json"
    if path.is_symlink() or not path.is_file():
        raise RequestError(f"{printable(path)} is missing, or not a regular file; {WAY_OUT}")
    config = read_json(path, dict[str, Any], WAY_OUT)
    _check_config(config, record, printable(folder))
    return config


def _published_files(folder: Path) -> dict[str, Path]:
    """Return the weights and the plots of a model folder by the names that they get; others are named in the log."""
    plots = [] if (folder / "plots").is_symlink() else [folder / "plots" / name for name in PLOTS]
    known = {folder / WEIGHTS, *(path for path in plots if path.is_file() and not path.is_symlink())}
    generated = {folder / "config.json", folder / "README.md", folder / "plots"}
    others = [
        path.relative_to(folder).as_posix()
        for path in sorted([*folder.iterdir(), *(folder / "plots").glob("*")])
        if path not in known | generated
    ]
    if others:
        _logger.warning("not uploaded, as they are not part of the model: %s", listing(others))
    return {path.relative_to(folder).as_posix(): path for path in sorted(known)}


_CONFIG_KEYS = frozenset(
    {"architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg"}
    | {"resnext_hub"}
)


def _check_config(config: Mapping[str, Any], record: RunRecord, where: str) -> None:
    """Raise RequestError unless a config.json holds what training wrote, and nothing by which other code is loaded."""
    unknown = sorted(config.keys() - _CONFIG_KEYS)
    if unknown:
        raise RequestError(f"{where}: config.json holds {listing(unknown)}, which is not of the model; {WAY_OUT}")
    parse_config(dict(config), where)
    cfg = config["pretrained_cfg"]
    for name, found, expected in (
        ("architecture", config["architecture"], record.model.architecture),
        ("label_names", config.get("label_names"), record.label_names),
        ("model_args", config.get("model_args") or {}, record.model.model_args),
        *((f"pretrained_cfg.{name}", cfg.get(name), value) for name, value in record.model.input.items()),
    ):
        if found != expected:
            raise RequestError(f"{where}: the {name} of config.json is not that of record.json; {WAY_OUT}")


def _card_here(folder: Path, overwrite: bool) -> CardFile | None:
    """Read the card of the model folder, for what its owner wrote into it.

    Raises:
        RequestError: If it cannot be read and may not be overwritten.
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
            f"{printable(path)} cannot be read ({one_line(error)}); mend it, or overwrite it with --overwrite-card"
        ) from error
    return None if overwrite and card.foreign else card


class _Staged:
    """The files of one upload by their names; the card is made anew for what stands on the Hub."""

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

    def join(self, there: str | None) -> None:
        """Write the card, with what its owner wrote here and on the Hub.

        Args:
            there: The card on the Hub, if there is one.

        Raises:
            RequestError: If something of it would be lost.
        """
        own = set(yaml_fields(self._metadata))
        try:
            card = None if there is None else take_apart(there, TAGS)
            kept = choose_kept(self._here, card, own)
        except ValueError as error:
            here = self._here.kept if self._here else Kept()
            _log_difference(there or "", put_together(self._metadata, self._body, here))
            raise RequestError(
                f"{one_line(error)}: nothing was uploaded; move the words above or below the marks, or replace that "
                "card with --overwrite-card"
            ) from error
        self._card.write_text(put_together(self._metadata, self._body, kept), "utf-8")


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
        self, api: HfApi, repo_id: str, staged: _Staged, message: str, private: bool, create_pr: bool, revision: str
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
        there = None if self.staged.overwrite_card else fetch_text(repo_id, "README.md", head, CARD_BYTES)
        self.staged.join(there)
        if not differing_files(api, repo_id, head, self.staged.files):
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
            )
        if self.create_pr:
            return str(commit.pr_url), str(commit.pr_revision)
        return commit.commit_url, commit.oid

    def _open_pull(self) -> tuple[str, str] | None:
        """Find a pull request that says the same already."""
        pulls = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
        for pull in pulls:
            revision = f"refs/pr/{pull.num}"
            if pull.title == self.message and not differing_files(self.api, self.repo_id, revision, self.staged.files):
                return pull.url, revision
        return None


def _log_difference(old: str, new: str, most: int = 40) -> None:
    """Log how a card would change."""
    lines = [
        line
        for line in difflib.unified_diff(
            old.splitlines(), new.splitlines(), "the card there", "the new card", lineterm=""
        )
        if not line.startswith("@@")
    ]
    more = [f"… and {len(lines) - most} more lines"] if len(lines) > most else []
    _logger.warning("%s", "\n".join(printable(line)[:200] for line in [*lines[:most], *more]))


def _reason(error: Exception) -> str:
    status = status_of(error)
    if status == 401:
        return "the Hub does not accept the token, or there is none; log in with `hf auth login`"
    if status == 403:
        return f"your token may not write there ({one_line(error)})"
    return one_line(error)
