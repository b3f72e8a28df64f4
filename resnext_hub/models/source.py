"""A model by the words that people use for it: a name, `hf-hub:owner/repo`, or `local-dir:folder`."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, list_pretrained, split_model_name_tag
from torch import nn

from resnext_hub.errors import RequestError
from resnext_hub.models.fetch import check_revision, commit_of, fetch_file
from resnext_hub.models.resnext import VARIANTS, Variant, stock_architecture
from resnext_hub.models.saved import CONFIG, WEIGHTS, SavedModel, check_fit, named_config, read_model
from resnext_hub.text import printable

_RANDOM = ", or start from random weights with --no-pretrained"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What is known of a model before it is built, and where it comes from."""

    requested: str
    saved: SavedModel
    base_id: str | None
    """Hub id, or the folder's own name, of the weights to start from."""
    base_license: str | None

    @property
    def architecture(self) -> str:
        """timm architecture, or the name of a variant of this package."""
        return self.saved.config.architecture

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments by which a saved model differs from its architecture."""
        return self.saved.config.model_args

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What the model says of its input, in timm's keys."""
        return self.saved.config.pretrained_cfg

    @property
    def pretrained(self) -> bool:
        """Whether to start from its weights."""
        return self.saved.weights is not None


def find_model(requested: str, pretrained: bool | None = None, where: str | None = None) -> ModelSource:
    """Look a model up, and its weights if they are wanted, without building it.

    Args:
        requested: A name that timm knows, with or without a tag; `hf-hub:owner/repo[@revision]`; `local-dir:folder`.
        pretrained: Whether to start from its weights; None means yes for the last two forms and no for a name.
        where: How a message names it; `--model REQUESTED` if not given.

    Raises:
        RequestError: If there is no such model, it has no weights, or only pickled ones, or what is there does not
            fit together.
        RunError: If the Hub cannot be reached.
    """
    where = printable(f"--model {requested}" if where is None else where)
    kind, name = _split_kind(requested, where)
    pretrained = kind is not None if pretrained is None else pretrained
    if kind is None:
        return _find_by_name(name, pretrained, where)
    if kind == "local-dir":
        folder = _absolute(name)
        config, weights = folder / CONFIG, folder / WEIGHTS
        for path in (config, weights) if pretrained else (config,):
            if not os.path.lexists(path):
                raise RequestError(f"{where}: there is no {path.name} in {printable(folder)}")
        requested, base_id = f"local-dir:{folder}", local_name(folder)
    else:
        repo_id, at, revision = name.partition("@")
        if at:
            check_revision(f"{where}: {printable(revision) or 'nothing'} after @", revision)
        base_id = name
        config = fetch_file(where, repo_id, CONFIG, revision or None, ", or take a model folder or a name")
        if pretrained:  # of the same commit, even if the repository moves on in between
            weights = fetch_file(where, repo_id, WEIGHTS, commit_of(config), _RANDOM)
    saved = read_model(where, config, weights if pretrained else None)
    return ModelSource(
        requested=requested,
        saved=saved,
        base_id=base_id if pretrained else None,
        base_license=saved.config.pretrained_cfg["license"] if pretrained else None,
    )


def local_name(folder: Path) -> str:
    """Return a name for a model folder that is fit to be published: it holds no folder above the run or the model."""
    folder = folder.expanduser().absolute()
    of_a_run = any(os.path.isfile(folder.parent / name) for name in ("record.json", "config.yaml"))
    return printable("/".join(folder.parts[-2:] if of_a_run else folder.parts[-1:]))


def _absolute(folder: str) -> Path:
    """Return a folder's place; if it is a link, its own and not that of what it leads to."""
    path = Path(os.path.expanduser(folder))
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _split_kind(requested: str, where: str) -> tuple[str | None, str]:
    """Split `hf-hub:owner/repo` and `local-dir:folder`; a plain name has no kind.

    A path without a prefix is refused here, because older timm takes its last part for a name.
    """
    prefix, colon, rest = requested.partition(":")
    if colon and rest and prefix in ("hf-hub", "hf_hub", "local-dir"):
        return prefix.replace("_", "-"), rest
    if colon or "/" in requested or os.sep in requested:
        raise RequestError(
            f"{where} is neither a name nor of a known form; for a repository on the Hub say "
            f"hf-hub:{printable(rest or prefix)}, for a folder local-dir:{printable(rest or prefix)}"
        )
    return None, requested


def _find_by_name(name: str, pretrained: bool, where: str) -> ModelSource:
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        raise RequestError(f"{where}: there is no such model; close: {', '.join(_close_names(architecture))}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in list_pretrained(f"{architecture}.*")]
        raise RequestError(
            f"{where}: {architecture} has no weights {printable(tag)}, but {', '.join(tags) or 'none at all'}"
        ) from error
    saved = SavedModel(where=where, config=named_config(architecture, cfg))
    base_id: str | None = saved.config.pretrained_cfg.get("hf_hub_id")
    if not pretrained:
        return ModelSource(requested=name, saved=saved, base_id=None, base_license=None)
    if not base_id:
        tagged = sorted({split_model_name_tag(known)[0] for known in list_pretrained("resnext*_g*")})
        raise RequestError(
            f"{where} has no released weights to start from: begin with random ones (--no-pretrained) or take one of "
            f"{', '.join(tagged)}"
        )
    filename = saved.config.pretrained_cfg.get("hf_hub_filename") or WEIGHTS
    if not filename.endswith(".safetensors"):
        raise RequestError(f"{where}: its weights are in {filename}, and pickled weights are not loaded")
    repo_id, _, revision = base_id.partition("@")
    weights = fetch_file(where, repo_id, filename, revision or None, _RANDOM)
    return ModelSource(
        requested=name,
        saved=check_fit(replace(saved, weights=weights)),
        base_id=base_id,
        base_license=saved.config.pretrained_cfg.get("license"),
    )


def _close_names(name: str) -> list[str]:
    """Return names to suggest: the family's first, by its own depths, then what is spelled alike."""
    known = [*VARIANTS, *timm.list_models("resnext*"), *timm.list_models("resnet*")]
    lower = name.lower().replace("-", "")
    same = [known_name for known_name in known if known_name.startswith(lower)]
    if lower in ("resnext", "resnext50"):
        same = ["resnext_g32", *same]  # depth 50 is left out of our names
    alike = difflib.get_close_matches(lower, [*known, *timm.list_models()], n=4)
    return list(dict.fromkeys([*same, *alike]))[:4] or list(VARIANTS)[:4]


def build_model(
    source: ModelSource, classes: int | Sequence[str], drop_rate: float = 0.0, drop_path_rate: float = 0.0
) -> nn.Module:
    """Build a model with a classifier of its own, and its weights if the source says so.

    Args:
        source: The model.
        classes: Names of the classes in their order, or their number. A saved classifier is kept where it has these.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Probability of dropping a residual branch.

    Raises:
        RequestError: If the architecture does not take the arguments, or weights are not finite.
    """
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
    return source.saved.start(names, drop_rate, drop_path_rate)


def variant_of(source: ModelSource) -> Variant | None:
    """Return the row of the family that a source stands for, whatever name it goes by, or None if it is of no row."""
    if source.architecture in VARIANTS:
        return VARIANTS[source.architecture] if not source.model_args else None
    for variant in VARIANTS.values():
        stock = stock_architecture(variant)
        if stock is not None and (stock.name, stock.model_args) == (source.architecture, source.model_args):
            return variant
    return None


def portable_architecture(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Return the architecture and arguments to publish: stock timm's own words wherever it has some."""
    if source.architecture in VARIANTS:
        stock = stock_architecture(VARIANTS[source.architecture])
        if stock is not None:
            return stock.name, {**stock.model_args, **source.model_args}
    return source.architecture, dict(source.model_args)


def needs_plugin(architecture: str) -> bool:
    """Return whether an architecture can be built only after `import resnext_hub`."""
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
