"""One file of a repository on the Hub, in the Hub's cache, compared with what the Hub said of it."""

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
"""What the Hub's client raises: the first is the base of what its HTTP library does; the last comes from
Xet, over which large files go, and wraps what goes wrong with one that goes over plain LFS."""

_REVISION = r"(?!.*(?:\.\.|//|/$))[A-Za-z0-9_][A-Za-z0-9._/@+-]{0,249}"


def fetch_file(where: str, repo_id: str, filename: str, revision: str | None, hint: str = "") -> Path:
    """Download a file of a model repository, or take it from the cache.

    Args:
        where: How the user names the model, to begin a message with.
        repo_id: `owner/name`.
        filename: Of the file.
        revision: Branch, tag or commit; None for main.
        hint: What else the user can do if the Hub cannot be reached.

    Raises:
        RequestError: If there is no such file that you may read.
        RunError: If the Hub cannot be reached, or the bytes are not those that it announced.
    """
    shown = printable(repo_id)
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"{where}: the Hub could not be reached for {filename} of {shown}, and it is not in the cache; try again "
            f"later{hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{where}: {shown} has no revision {printable(revision)}") from error
    except EntryNotFoundError as error:
        raise RequestError(f"{where}: {shown} has no {filename} (pickled weights are not loaded)") from error
    except GatedRepoError as error:
        raise RequestError(
            f"{where}: {shown} is gated: ask for access at its page, and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"{where}: there is no repository {shown} that you may read; a private one needs a login"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"{where}: {shown} is not a Hub id of the form owner/name") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last comes from Xet, over which large files go
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        kind = RequestError if 400 <= status < 500 and status not in (408, 429) else RunError
        raise kind(f"{where}: {filename} of {shown} could not be fetched from the Hub: {one_line(error)}") from error
    if not _is_announced(path):
        forget(path)
        raise RunError(
            f"{where}: {filename} of {shown} has other bytes than the Hub lists; it was removed from the cache, so "
            "rerun the same command to fetch it anew"
        )
    return path


def check_revision(where: str, revision: object) -> None:
    """Raise RequestError unless a text can be a branch, tag or commit; the client makes a path of its cache of it.

    Args:
        where: How the user gave it, to begin a message with.
        revision: The text, or what was given in its place.
    """
    if not isinstance(revision, str) or not re.fullmatch(_REVISION, revision):
        raise RequestError(f"{where} is no revision: expected a branch, tag or commit, such as main or refs/pr/1")


def commit_of(path: Path) -> str:
    """Return the commit of a file in the cache, after which its snapshot folder is named."""
    return next((folder.name for folder in path.parents if folder.parent.name == "snapshots"), path.parent.name)


def forget(path: Path) -> None:
    """Remove a file of a snapshot from the Hub's cache, and its content where that is in the same cache.

    A snapshot links to the blob of its repository, and what came over Xet is linked from there to a store that the
    repositories of a cache share. Nothing outside the cache is ever removed, whatever a name or a link leads to.
    """
    path = Path(os.path.abspath(path))  # without the `..` that a hostile listing may hold
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
    """Return whether a file has the hash that the Hub announced, after which the cache names the blob that it links to.

    The client compares its length alone.
    """
    announced = os.path.basename(os.readlink(path)) if path.is_symlink() else path.name
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        return same_content(path, announced, None)
    if re.fullmatch(r"[0-9a-f]{40}", announced):
        return same_content(path, None, announced)
    return True  # a cache without links has no such names


@dataclass(frozen=True)
class Listing:
    """What the Hub says of the files of a commit."""

    commit: str
    hashes: dict[str, tuple[str | None, str | None]]
    """SHA-256 of a large file, git's hash of a small one."""

    def check(self, where: str, paths: dict[str, Path]) -> None:
        """Raise RunError if a file in the cache is not the listed one, and remove that file."""
        for name, path in paths.items():
            if name in self.hashes and forget_wrong(path, *self.hashes[name]):
                raise RunError(
                    f"{name} of {where} has other bytes than the Hub lists; it was removed from the cache, so load it "
                    "again to fetch it anew"
                )


def list_files(where: str, repo_id: str, revision: str | None) -> Listing:
    """List a commit of a model repository.

    Args:
        where: How the user names the model, to begin a message with.
        repo_id: `owner/name`.
        revision: Branch, tag or commit; None for main.

    Raises:
        RequestError: If there is no such repository that you may read, or it has no safetensors.
        RunError: If the Hub cannot be reached.
    """
    try:
        info = HfApi(library_name="resnext-hub").model_info(repo_id, revision=revision, files_metadata=True)
    except GatedRepoError as error:
        raise RequestError(f"{where} is gated: ask for access at its page, and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{where} has no revision {printable(revision)}") from error
    except RepositoryNotFoundError as error:
        raise RequestError(f"there is no repository {where} that you may read; a private one needs a login") from error
    except HFValidationError as error:
        raise RequestError(f"{where} is not a Hub id of the form owner/name") from error
    except (OfflineModeIsEnabled, *HUB_ERRORS) as error:
        raise RunError(
            f"{where} could not be loaded from the Hub: {one_line(error)}; verify=False loads a copy from the cache"
        ) from error
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise RunError(f"{where}: the Hub's answer names no commit; try again later")
    hashes = {
        entry.rfilename: (entry.lfs.sha256 if entry.lfs else None, entry.blob_id) for entry in info.siblings or []
    }
    if "model.safetensors" not in hashes:
        raise RequestError(f"{where} has no model.safetensors; pickled weights are not loaded")
    return Listing(str(info.sha), hashes)


def forget_wrong(path: Path, sha256: str | None, blob_id: str | None) -> bool:
    """Say whether a file in the cache is not what the Hub lists; then remove it, so that it is fetched anew.

    The client does not compare what comes over Xet with anything but its length.
    """
    if same_content(path, sha256, blob_id):
        return False
    forget(path)
    return True
