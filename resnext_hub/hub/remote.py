"""What a repository on the Hub holds, compared with a folder here, and trying again where that is worth it."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import FileTooLargeError, read_regular, same_content
from resnext_hub.models.fetch import HUB_ERRORS

_logger = logging.getLogger(__name__)

ATTEMPTS = 4

PAUSE = 1.0
"""Seconds before the second attempt; each later one waits twice as long."""

TRANSIENT = frozenset((408, 409, 412, 429, 500, 502, 503, 504))
"""Answers after which the same request may succeed; 409 and 412 mean that somebody else was quicker."""

Result = TypeVar("Result")


def status_of(error: Exception) -> int | None:
    """Give the status of the answer that an error is about, if there was an answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def persist(work: Callable[[], Result], what: str) -> Result:
    """Do work that may be done twice, again after a failure that can pass, with longer and longer waits.

    Raises:
        HTTPError: What the last attempt raised, or the first that no further attempt would mend.
        OSError: The same, from a connection.
        RuntimeError: The same, from Xet.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except HUB_ERRORS as error:
            status = status_of(error)
            if status is not None and status not in TRANSIENT:
                raise
            seconds = _wait_asked_for(error) or PAUSE * 2.0 ** (attempt - 1)
            _logger.warning("%s: %s; trying again in %g s", what, one_line(error)[:160], seconds)
        time.sleep(seconds)
    return work()


def _wait_asked_for(error: Exception) -> float | None:
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return None
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else None


def files_under(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and those below it by their names in a repository."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def commit_files(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    message: str,
    *,
    revision: str,
    parent: str | None,
    create_pr: bool = False,
    deletions: Sequence[CommitOperationDelete] = (),
) -> CommitInfo:
    """Upload files in one commit, or none.

    Not by the client's `upload_folder`: over Xet that may make several commits, leaves an empty pull request where the
    commit to it fails, and repeats a commit whose answer was lost.

    Args:
        api: The client.
        repo_id: The repository.
        files: What is sent, by name in the repository.
        message: Of the commit.
        revision: The branch.
        parent: Its head, so that an attempt whose answer was lost and a second one cannot both land.
        create_pr: Open a pull request instead.
        deletions: What goes in the same commit.
    """
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    try:
        return api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except RuntimeError as error:
        if isinstance(error.__cause__, HUB_ERRORS):
            raise error.__cause__ from None
        raise


@contextmanager
def no_bars() -> Iterator[None]:
    """Silence the client's progress bars, which it draws in a log as on a terminal, unless they were asked for."""
    if HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def differing_files(
    api: HfApi, repo_id: str, revision: str, files: Mapping[str, Path], read_back: bool = False
) -> list[str]:
    """Name the files that a revision does not hold to the byte.

    Large files are compared by the SHA-256 that the Hub lists; small ones by git's hash, or where that says that they
    differ, and with `read_back` always, by the bytes that the Hub gives.
    """
    listed = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }
    differing = []
    with tempfile.TemporaryDirectory() as cache:
        for name, path in files.items():
            entry = listed.get(name)
            same = entry is not None and same_content(path, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            if (
                entry is not None
                and entry.lfs is None
                and (read_back or not same)
                and entry.size == path.stat().st_size
            ):
                fetched = hf_hub_download(repo_id, name, revision=revision, cache_dir=cache)
                same = Path(fetched).read_bytes() == path.read_bytes()
            if not same:
                differing.append(name)
    return differing


def fetch_text(repo_id: str, name: str, revision: str, limit: int) -> str | None:
    """Return a text file of a repository as it is at a revision, or None if there is none.

    Raises:
        RequestError: If it is larger than the limit in bytes, or not UTF-8.
    """
    with tempfile.TemporaryDirectory() as cache:
        try:
            path = hf_hub_download(repo_id, name, revision=revision, cache_dir=cache)
        except EntryNotFoundError:
            return None
        try:
            return read_regular(path, limit).decode()
        except (FileTooLargeError, UnicodeDecodeError) as error:
            raise RequestError(f"{name} of {repo_id} cannot be read: {one_line(error)}") from error
