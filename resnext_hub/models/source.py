"""A network by the words that people use for it: a name, `hf-hub:owner/repo`, or `local-dir:folder`."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from timm.models import (
    get_pretrained_cfg,
    list_pretrained,
    split_model_name_tag,
)
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.models.resnext import VARIANTS, Variant, stock_architecture
from resnext_hub.text import printable

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What is known of a network before it is built."""

    requested: str
    architecture: str
    """timm architecture, or the name of a variant of this package."""
    model_args: dict[str, Any]
    """Arguments by which a saved model differs from its architecture."""
    pretrained_cfg: dict[str, Any]
    pretrained: bool
    """Whether to start from its weights."""
    base_id: str | None
    """Hub id, or the folder's own name, of the weights to start from."""
    base_license: str | None


def find_model(requested: str, pretrained: bool | None = None) -> ModelSource:
    """Look a network up, and its weights if they are wanted, without building it.

    Args:
        requested: A name that timm knows, with or without a tag; `hf-hub:owner/repo[@revision]`; `local-dir:folder`.
        pretrained: Whether to start from its weights; None means yes for the last two forms and no for a name.

    Raises:
        RequestError: If there is no such network, or it has no weights, or only pickled ones on the Hub.
        RunError: If the Hub cannot be reached.
    """
    kind, name = _split_kind(requested)
    pretrained = kind is not None if pretrained is None else pretrained
    if kind is None:
        return _find_by_name(name, pretrained)
    if kind == "local-dir":
        folder = Path(name).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise RequestError(f"--model {requested}: there is no config.json in {folder}")
        if pretrained and not (folder / WEIGHTS).is_file():
            raise RequestError(f"--model {requested}: there is no {WEIGHTS} in {folder}")
        requested, base_id = f"local-dir:{folder}", local_name(folder)
        cfg, architecture, model_args = load_model_config_from_path(folder)
    else:
        base_id = name
        _require_hub_file(requested, name, "config.json")
        if pretrained:
            _require_hub_file(requested, name, WEIGHTS)
        cfg, architecture, model_args = load_model_config_from_hf(name)
    if not timm.is_model(architecture):
        raise RequestError(
            f"--model {requested}: its architecture {architecture} is unknown to timm {timm.__version__}"
        )
    return ModelSource(
        requested=requested,
        architecture=architecture,
        model_args=dict(model_args),
        pretrained_cfg=dict(cfg),
        pretrained=pretrained,
        base_id=base_id if pretrained else None,
        base_license=cfg.get("license") if pretrained else None,
    )


def local_name(folder: Path) -> str:
    """Return a name for a model folder that holds no folder above its run: `run/model`, or the folder's own name."""
    folder = folder.expanduser().resolve()
    of_a_run = any(os.path.isfile(folder.parent / name) for name in ("record.json", "config.yaml"))
    return printable("/".join(folder.parts[-2:] if of_a_run else folder.parts[-1:]))


def _split_kind(requested: str) -> tuple[str | None, str]:
    """Split `hf-hub:owner/repo` and `local-dir:folder`; a plain name has no kind.

    A path without a prefix is refused here, because older timm takes its last part for a name.
    """
    prefix, colon, rest = requested.partition(":")
    if colon and rest and prefix in ("hf-hub", "hf_hub", "local-dir"):
        return prefix.replace("_", "-"), rest
    if colon or "/" in requested or os.sep in requested:
        raise RequestError(
            f"--model {requested} is neither a name nor of a known form; for a repository on the Hub say "
            f"hf-hub:{rest or prefix}, for a folder local-dir:{rest or prefix}"
        )
    return None, requested


def _find_by_name(name: str, pretrained: bool) -> ModelSource:
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4) or list(VARIANTS)
        raise RequestError(f"--model {name}: there is no such network; close: {', '.join(close)}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in list_pretrained(f"{architecture}.*")]
        raise RequestError(
            f"--model {name}: {architecture} has no weights {tag}, but {', '.join(tags) or 'none at all'}"
        ) from error
    facts: dict[str, Any] = {"input_size": (3, 224, 224)} if cfg is None else cfg.to_dict()
    base_id = facts.get("hf_hub_id")
    if pretrained:
        if not base_id:
            tagged = sorted({split_model_name_tag(known)[0] for known in list_pretrained("resnext*_g*")})
            raise RequestError(
                f"--model {name} has no released weights to start from: begin with random ones (--no-pretrained) or "
                f"take one of {', '.join(tagged)}"
            )
        _require_hub_file(name, base_id, facts.get("hf_hub_filename") or WEIGHTS)
    return ModelSource(
        requested=name,
        architecture=architecture,
        model_args={},
        pretrained_cfg=facts,
        pretrained=pretrained,
        base_id=base_id if pretrained else None,
        base_license=facts.get("license") if pretrained else None,
    )


def _require_hub_file(requested: str, repo: str, filename: str) -> None:
    """Fetch a file into the Hub's cache before anything depends on it; weights are read from safetensors alone."""
    repo_id, _, revision = repo.partition("@")
    try:
        hf_hub_download(repo_id, filename, revision=revision or None)
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"the Hub could not be reached for {filename} of {repo_id}, and it is not in the cache; try again later, "
            "or start from random weights with --no-pretrained"
        ) from error
    except EntryNotFoundError as error:
        raise RequestError(
            f"--model {requested}: {repo_id} has no {filename} (pickled weights are not loaded)"
        ) from error
    except HFValidationError as error:
        raise RequestError(f"--model {requested}: {repo_id} is not a Hub id of the form owner/name") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise RequestError(f"--model {requested}: {repo_id} cannot be read from the Hub: {reason}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last comes from Xet, over which large files go
        raise RunError(f"{filename} of {repo_id} could not be fetched from the Hub: {one_line(error)}") from error


def build_model(
    source: ModelSource, num_classes: int, drop_rate: float = 0.0, drop_path_rate: float = 0.0
) -> nn.Module:
    """Build a network with a classifier of its own size, and its weights if the source says so.

    Raises:
        RequestError: If the architecture does not take the arguments.
    """
    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    extra: dict[str, Any] = {name: rate for name, rate in rates.items() if rate}
    try:
        model: nn.Module = timm.create_model(
            source.requested, pretrained=source.pretrained, num_classes=num_classes, **extra
        )
    except TypeError as error:
        if not extra:
            raise
        raise RequestError(f"--model {source.requested} does not take {', '.join(extra)}: {error}") from error
    return model


def variant_of(source: ModelSource) -> Variant | None:
    """Give the row of the family that a source stands for, whatever name it goes by, or None if it is of no row."""
    if source.architecture in VARIANTS:
        return VARIANTS[source.architecture] if not source.model_args else None
    for variant in VARIANTS.values():
        stock = stock_architecture(variant)
        if stock is not None and (stock.name, stock.model_args) == (source.architecture, source.model_args):
            return variant
    return None


def portable_architecture(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Give the architecture and arguments to publish: stock timm's own words wherever it has some."""
    if source.architecture in VARIANTS:
        stock = stock_architecture(VARIANTS[source.architecture])
        if stock is not None:
            return stock.name, {**stock.model_args, **source.model_args}
    return source.architecture, dict(source.model_args)


def needs_plugin(architecture: str) -> bool:
    """Say whether an architecture can be built only after `import resnext_hub`."""
    return architecture in VARIANTS


__all__ = [
    "WEIGHTS",
    "ModelSource",
    "build_model",
    "find_model",
    "local_name",
    "needs_plugin",
    "portable_architecture",
    "variant_of",
]
