"""Commits to a repository on the Hub, comparison with local files, and retries of transient errors."""

import logging
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

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
"""Largest number of attempts per request."""

PAUSE = 1.0
"""Seconds before the second attempt; doubled for each later one."""

TRANSIENT = frozenset((408, 409, 412, 429, 500, 502, 503, 504))
"""HTTP status codes worth retrying; 409 and 412 mean that another commit came first."""

RepoType: TypeAlias = Literal["model", "space"]
"""Kind of a repository on the Hub that is written to."""

Result = TypeVar("Result")


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an error, or None if there was no response."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def persist(work: Callable[[], Result], repo_id: str) -> Result:
    """Call an idempotent function, with retries and exponential backoff for transient errors.

    Raises:
        HTTPError: The error of the last attempt, or the first one that is not transient.
        OSError: The same, for the connection.
        RuntimeError: The same, for Xet.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except HUB_ERRORS as error:
            status = status_of(error)
            if status is not None and status not in TRANSIENT:
                raise
            seconds = _retry_after(error) or PAUSE * 2.0 ** (attempt - 1)
            _logger.warning("%s: %s; retrying in %g s", repo_id, one_line(error)[:160], seconds)
        time.sleep(seconds)
    return work()


def _retry_after(error: Exception) -> float | None:
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return None
    value = error.response.headers.get("Retry-After", "")
    return min(float(value), 60.0) if value.isdigit() else None


def files_under(folder: Path) -> dict[str, Path]:
    """Return the files below a folder, by relative path."""
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
    repo_type: RepoType = "model",
) -> CommitInfo:
    """Upload files in exactly one commit.

    The client's `upload_folder` may split a Xet upload into several commits, leaves an empty pull request if its commit
    fails, and repeats a commit whose response was lost.

    Args:
        api: The client.
        repo_id: The repository.
        files: Files to upload, by name in the repository.
        message: Commit message.
        revision: Branch to commit to.
        parent: Head of the branch; it prevents a second commit if the response to the first one was lost.
        create_pr: Whether to open a pull request instead.
        deletions: Files to delete in the same commit.
        repo_type: Kind of the repository.
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
            repo_type=repo_type,
        )
    except RuntimeError as error:
        if isinstance(error.__cause__, HUB_ERRORS):
            raise error.__cause__ from None
        raise


@contextmanager
def no_bars() -> Iterator[None]:
    """Disable the client's progress bars, which it draws even without a terminal, unless the user configured them."""
    if HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def differing_files(
    api: HfApi,
    repo_id: str,
    revision: str,
    files: Mapping[str, Path],
    read_back: bool = False,
    repo_type: RepoType = "model",
    absent: Collection[str] = (),
) -> list[str]:
    """Return the names of files that a revision does not contain byte for byte, and those that it should not contain.

    Large files are compared by the SHA-256 listed by the Hub, small ones by git's hash. Small files whose hashes differ
    are downloaded and compared; with `read_back`, all small files are.
    """
    listed = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True, repo_type=repo_type)
        if isinstance(entry, RepoFile)
    }
    differing = [name for name in absent if name in listed]
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
                fetched = hf_hub_download(repo_id, name, revision=revision, cache_dir=cache, repo_type=repo_type)
                same = Path(fetched).read_bytes() == path.read_bytes()
            if not same:
                differing.append(name)
    return differing


def fetch_text(repo_id: str, name: str, revision: str, limit: int) -> str | None:
    """Return a text file of a repository at a revision, or None if it does not exist.

    Raises:
        RequestError: If it exceeds the limit in bytes, or is not UTF-8.
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
