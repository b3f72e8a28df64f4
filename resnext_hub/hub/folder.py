"""Publish files of any kind to a repository on the Hub in one commit, and verify them afterwards."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import HfApi

from resnext_hub.errors import RunError, setting
from resnext_hub.hub.publish import Publication, failure_reason
from resnext_hub.hub.remote import RepoType, commit_files, differing_files, no_bars, persist
from resnext_hub.models.fetch import HUB_ERRORS, check_revision


def publish_files(
    files: Mapping[str, Path],
    repo_id: str,
    message: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    dry_run: bool = False,
    space: bool = False,
) -> Publication:
    """Upload files in one commit, unless the repository has them already, and compare them with the local ones.

    Args:
        files: Local files by their names in the repository.
        repo_id: `owner/name`; created if it does not exist.
        message: Message of the commit.
        private: Whether to create a new repository as private.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to; created if it does not exist.
        dry_run: Whether to only list the files, without any request.
        space: Whether the repository is a static Space, rather than one of a model.

    Raises:
        RequestError: If the revision is not a valid name.
        RunError: If the Hub rejects the request, cannot be reached, or returns different bytes.
    """
    check_revision(setting("revision", revision), revision)
    sizes = [(name, path.stat().st_size) for name, path in sorted(files.items())]
    if dry_run:
        return Publication(address=None, changed=True, files=sizes)
    api = HfApi(library_name="resnext-hub")
    kind: RepoType = "space" if space else "model"
    sdk = "static" if space else None
    sent = False

    def commit() -> tuple[str, str]:
        nonlocal sent
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind)
        head = api.repo_info(repo_id, revision=revision, repo_type=kind).sha or revision
        if not differing_files(api, repo_id, head, files, repo_type=kind):
            return f"{api.endpoint}/{'spaces/' if space else ''}{repo_id}", head
        sent = True
        with nullcontext() if sys.stderr.isatty() else no_bars():
            done = commit_files(
                api, repo_id, files, message, revision=revision, parent=head, create_pr=create_pr, repo_type=kind
            )
        if create_pr:
            return str(done.pr_url), str(done.pr_revision)
        return done.commit_url, done.oid

    try:
        address, where = persist(commit, repo_id)
        wrong = persist(lambda: differing_files(api, repo_id, where, files, read_back=True, repo_type=kind), repo_id)
    except HUB_ERRORS as error:
        raise RunError(
            f"{repo_id} could not be published: {failure_reason(error)}; rerun the same command to publish it"
        ) from error
    if wrong:
        raise RunError(
            f"{repo_id}: the upload differs from the local files ({', '.join(wrong)}); rerun the same command to "
            "upload it again"
        )
    return Publication(address=address, changed=sent, files=sizes)
