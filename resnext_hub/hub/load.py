"""From a repository on the Hub to a network, with a check of what came."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download
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
from resnext_hub.models.source import WEIGHTS

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
    """Class names in the order of the logits; empty if the repository states none."""
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
    try:
        listed = {}
        if verify:
            info = HfApi(library_name="resnext-hub").model_info(repo_id, revision=revision, files_metadata=True)
            listed = {entry.rfilename: entry for entry in info.siblings or []}
            revision = info.sha
            if WEIGHTS not in listed:
                raise RequestError(f"{repo_id} has no {WEIGHTS}; pickled weights are not loaded")
        paths = {name: Path(hf_hub_download(repo_id, name, revision=revision)) for name in ("config.json", WEIGHTS)}
    except GatedRepoError as error:
        raise RequestError(
            f"{repo_id} is gated: ask for access at its page, and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{repo_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"there is no repository {repo_id} that you may read; a private one needs a login"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"{repo_id} is not a Hub id of the form owner/name") from error
    except (OfflineModeIsEnabled, *HUB_ERRORS) as error:
        hint = "; verify=False loads a copy from the cache" if verify else ""
        raise RunError(f"{repo_id} could not be loaded from the Hub: {one_line(error)}{hint}") from error
    for name, path in paths.items():
        entry = listed.get(name)
        if entry is not None and forget_wrong(path, entry.lfs.sha256 if entry.lfs else None, entry.blob_id):
            raise RunError(
                f"{name} of {repo_id} has other bytes than the Hub lists; it was removed from the cache, so that it is "
                "fetched anew"
            )
    # a snapshot folder of the cache is named after its commit
    commit = paths[WEIGHTS].parent.name
    model = timm.create_model(f"hf-hub:{repo_id}@{commit}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    names = model.pretrained_cfg.get("label_names") or ()
    return HubModel(model, transform, tuple(names), commit)
