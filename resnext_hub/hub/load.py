"""From a repository on the Hub to a network, with a check of what came."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.hub.remote import HUB_ERRORS, forget_wrong
from resnext_hub.models.fetch import check_revision, commit_of, fetch_file
from resnext_hub.models.saved import CONFIG, WEIGHTS, read_model
from resnext_hub.settings import shown
from resnext_hub.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class HubModel:
    """A network from the Hub, with what belongs to it."""

    model: nn.Module
    """In evaluation mode: pictures `(N, C, H, W)` to logits `(N, classes)`."""
    transform: "Callable[[Image], torch.Tensor]"
    """Maps a picture to the network's input `(C, H, W)`."""
    label_names: tuple[str, ...]
    """Class names in the order of the logits: the stated ones, ImageNet's for timm's weights of it, else numbers."""
    revision: str
    """The commit that it came from."""


def from_hub(repo_id: str, *, revision: str | None = None, verify: bool = True) -> HubModel:
    """Download a network, check its bytes against the Hub's listing, and build it.

    Args:
        repo_id: `owner/name` of a repository that timm can load.
        revision: Branch, tag or commit; main if not given. The commit that it means now is what is loaded.
        verify: Compare the SHA-256 of what is on the disk with what the Hub lists. Without it, a copy in the cache
            is enough and the Hub need not be reached.

    Raises:
        RequestError: If there is no such repository, you have no access, or it has no safetensors.
        RunError: If the Hub cannot be reached, or the bytes are not those that it lists.
    """
    if not isinstance(repo_id, str) or not repo_id.strip():
        raise RequestError(f"repo_id={shown(repr(repo_id))} is not a Hub id of the form owner/name")
    where = shown(repo_id)
    if revision is not None:
        check_revision(f"{where}: revision={shown(repr(revision))}", revision)
    listed = _list_files(where, repo_id, revision) if verify else None
    commit = revision if listed is None else listed.commit
    paths = {}
    for name in (CONFIG, WEIGHTS):
        paths[name] = fetch_file(where, repo_id, name, commit)
        commit = commit_of(paths[name])  # both of the same one, even if the repository moves on in between
    if listed is not None:
        listed.check(where, paths)
    saved = read_model(where, paths[CONFIG], paths[WEIGHTS])
    transform = timm.data.create_transform(**saved.data_config, is_training=False)
    return HubModel(saved.load(), transform, saved.label_names, str(commit))


@dataclass(frozen=True)
class _Listing:
    """What the Hub says of the files of a commit."""

    commit: str
    hashes: dict[str, tuple[str | None, str | None]]
    """SHA-256 of a large file, git's hash of a small one."""

    def check(self, where: str, paths: dict[str, Path]) -> None:
        """Raise RunError if a file in the cache is another one."""
        for name, path in paths.items():
            if name in self.hashes and forget_wrong(path, *self.hashes[name]):
                raise RunError(
                    f"{name} of {where} has other bytes than the Hub lists; it was removed from the cache, so load it "
                    "again to fetch it anew"
                )


def _list_files(where: str, repo_id: str, revision: str | None) -> _Listing:
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
    if WEIGHTS not in hashes:
        raise RequestError(f"{where} has no {WEIGHTS}; pickled weights are not loaded")
    return _Listing(str(info.sha), hashes)
