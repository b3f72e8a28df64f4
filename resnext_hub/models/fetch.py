"""Fetch files of a Hub repository into the cache and verify them against the hashes that the Hub lists."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import same_content
from resnext_hub.text import printable

HUB_ERRORS = (HTTPError, OSError, RuntimeError)
"""Exceptions of the Hub's client. HTTPError is the base class of its HTTP library's; RuntimeError comes from Xet, which
transfers large files and also wraps the errors of plain LFS."""

_REVISION = r"(?!.*(?:\.\.|//|/$))[A-Za-z0-9_][A-Za-z0-9._/@+-]{0,249}"


def fetch_file(where: str, repo_id: str, filename: str, revision: str | None, hint: str = "") -> Path:
    """Download a file of a model repository, or return it from the cache.

    Args:
        where: How the user named the model, printable; messages begin with it.
        repo_id: `owner/name`.
        filename: Name of the file.
        revision: Branch, tag or commit; None for main.
        hint: Alternative for the user if the Hub cannot be reached, appended to the message.

    Raises:
        RequestError: If the file does not exist or access is denied.
        RunError: If the Hub cannot be reached, or the bytes differ from those it announced.
    """
    shown = printable(repo_id)
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"{where}: {filename} of {shown} is not in the cache, and the Hub could not be reached; try again later"
            f"{hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{where}: {shown} has no revision {printable(revision)}") from error
    except EntryNotFoundError as error:
        raise RequestError(f"{where}: {shown} has no {filename} (pickled weights are not loaded)") from error
    except GatedRepoError as error:
        raise RequestError(
            f"{where}: {shown} is gated: request access on its page, and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"{where}: repository {shown} does not exist, or is private; if it is private, log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"{where}: {shown} is not a Hub ID of the form owner/name") from error
    except HUB_ERRORS as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        kind = RequestError if 400 <= status < 500 and status not in (408, 429) else RunError
        raise kind(f"{where}: {filename} of {shown} could not be downloaded from the Hub: {one_line(error)}") from error
    if not _is_announced(path):
        forget(path)
        raise RunError(
            f"{where}: {filename} of {shown} does not match its hash on the Hub; it was removed from the cache, so "
            "rerun the same command to download it again"
        )
    return path


def check_revision(where: str, revision: object) -> None:
    """Raise RequestError unless a revision is a valid branch, tag or commit.

    The client uses the revision as part of a path in its cache.

    Args:
        where: How the user named it, printable; the message begins with it.
        revision: The revision to check, of any type.
    """
    if not isinstance(revision, str) or not re.fullmatch(_REVISION, revision):
        raise RequestError(
            f"{where} is not a valid revision: expected a branch, tag or commit, such as main or refs/pr/1"
        )


def commit_of(path: Path) -> str:
    """Return the commit of a file in the cache: the name of its snapshot folder."""
    return next((folder.name for folder in path.parents if folder.parent.name == "snapshots"), path.parent.name)


def forget(path: Path) -> None:
    """Remove a file of a snapshot from the Hub's cache, with its content if that is in the same cache.

    A snapshot links to the blob of its repository, and a file transferred by Xet links from there to a store that all
    repositories of the cache share. Nothing outside the cache is ever removed, wherever a name or a link points.
    """
    path = Path(os.path.abspath(path))  # without the `..` that a hostile listing may contain
    repository = next((folder.parent for folder in path.parents if folder.name == "snapshots"), None)
    if repository is None:
        return
    places = [path]
    while places[-1].is_symlink() and len(places) < 3:
        places.append(Path(os.path.abspath(places[-1].parent / os.readlink(places[-1]))))
    for place in reversed(places):
        shared = re.fullmatch(r"[0-9a-f]{64}", place.name) and place.is_relative_to(repository.parent)
        if (shared or place.is_relative_to(repository)) and (place.is_symlink() or place.is_file()):
            place.unlink()


def _is_announced(path: Path) -> bool:
    """Return whether a file has the hash that the Hub announced: the name of the blob that it links to.

    The client compares only its length.
    """
    announced = os.path.basename(os.readlink(path)) if path.is_symlink() else path.name
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        return same_content(path, announced, None)
    if re.fullmatch(r"[0-9a-f]{40}", announced):
        return same_content(path, None, announced)
    return True  # a cache without links has no such names


@dataclass(frozen=True)
class Listing:
    """The files of a commit as the Hub lists them."""

    commit: str
    hashes: dict[str, tuple[str | None, str | None]]
    """Name to the SHA-256 of a large file and git's hash of a small one."""

    def check(self, where: str, paths: dict[str, Path]) -> None:
        """Remove a file from the cache and raise RunError if it differs from the listed one."""
        for name, path in paths.items():
            if name in self.hashes and forget_wrong(path, *self.hashes[name]):
                raise RunError(
                    f"{name} of {where} does not match its hash on the Hub; it was removed from the cache, so "
                    "loading the model again will re-download it"
                )


def list_files(
    where: str, repo_id: str, revision: str | None, hint: str = "; use verify=False to load a cached copy"
) -> Listing:
    """Return the files of a model repository at a commit.

    Args:
        where: How the user named the model, printable; messages begin with it.
        repo_id: `owner/name`.
        revision: Branch, tag or commit; None for main.
        hint: Alternative for the user if the Hub cannot be reached, appended to the message.

    Raises:
        RequestError: If the repository does not exist, access is denied, or it has no model.safetensors.
        RunError: If the Hub cannot be reached.
    """
    try:
        info = HfApi(library_name="resnext-hub").model_info(repo_id, revision=revision, files_metadata=True)
    except GatedRepoError as error:
        raise RequestError(f"{where} is gated: request access on its page, and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{where} has no revision {printable(revision)}") from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"repository {where} does not exist, or is private; if it is private, log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"{where} is not a Hub ID of the form owner/name") from error
    except (OfflineModeIsEnabled, *HUB_ERRORS) as error:
        raise RunError(f"{where} could not be loaded from the Hub: {one_line(error)}{hint}") from error
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise RunError(f"{where}: the Hub's response contains no commit; try again later")
    hashes = {
        entry.rfilename: (entry.lfs.sha256 if entry.lfs else None, entry.blob_id) for entry in info.siblings or []
    }
    if "model.safetensors" not in hashes:
        raise RequestError(f"{where} has no model.safetensors; pickled weights are not loaded")
    return Listing(str(info.sha), hashes)


def fetch_repository(where: str, repo_id: str, revision: str | None) -> tuple[Path, Listing]:
    """Download all files of a model repository and compare each with the hash that the Hub lists.

    Returns:
        The folder of the files, and the listing.

    Raises:
        RequestError: If the repository does not exist, access is denied, or it has no model.safetensors.
        RunError: If the Hub cannot be reached, or a file differs; it is then removed from the cache.
    """
    listing = list_files(where, repo_id, revision, "; try again later")
    for name in listing.hashes:
        if not is_plain_path(name):
            raise RequestError(f"{where} lists the file {printable(name)[:80]}, which is not in the repository")
    paths = {name: fetch_file(where, repo_id, name, listing.commit) for name in listing.hashes}
    listing.check(where, paths)
    return paths["model.safetensors"].parent, listing


def is_plain_path(name: str) -> bool:
    """Return whether a name of a file stays below the folder that it is relative to."""
    return not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


def forget_wrong(path: Path, sha256: str | None, blob_id: str | None) -> bool:
    """Remove a file from the cache if it differs from what the Hub lists; return whether it did.

    The client compares only the length of files transferred by Xet.
    """
    if same_content(path, sha256, blob_id):
        return False
    forget(path)
    return True
