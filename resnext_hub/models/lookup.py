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
from resnext_hub.models.fetch import check_revision, commit_of, fetch_file, list_files
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.resnext import VARIANTS, Variant, stock_architecture
from resnext_hub.models.saved import CONFIG, WEIGHTS, SavedModel, check_fit, named_config, read_model
from resnext_hub.text import printable

_RANDOM = ", or start from random weights with --no-pretrained"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What is known of a model before it is built, and where it comes from."""

    requested: str
    """What the user asked for; a local folder with its absolute path."""
    saved: SavedModel
    base_id: str | None
    """Hub id, or the folder's own name, of the weights to start from."""
    base_license: str | None
    revision: str | None = None
    """Commit of a repository on the Hub."""

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
        """What the model states about its input, in timm's keys."""
        return self.saved.config.pretrained_cfg

    @property
    def pretrained(self) -> bool:
        """Whether to start from its weights."""
        return self.saved.weights is not None

    def load(self) -> "LoadedModel":
        """Load the model with its weights, as it was saved.

        Raises:
            RequestError: If it has no classifier, or weights that no model can have.
        """
        saved = self.saved
        if saved.config.num_classes < 1:
            raise RequestError(f"{saved.where} returns features, as it has no classes: expected a classifier")
        return LoadedModel(saved.load(), saved.input, saved.label_names, self)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its weights, its preprocessing and its class names."""

    model: nn.Module
    """In evaluation mode: normalized images `(N, C, H, W)` to logits `(N, classes)`."""
    input: InputConfig
    """The images that it takes."""
    label_names: tuple[str, ...]
    """A name for each logit: the stated ones, ImageNet's for timm's weights of it, else numbers."""
    source: ModelSource

    @property
    def revision(self) -> str | None:
        """Commit of the Hub that it was loaded from."""
        return self.source.revision

    @property
    def folder(self) -> Path | None:
        """Its model folder, absolute; None if it was not loaded from one."""
        kind, _, place = self.source.requested.partition(":")
        return Path(place) if kind == "local-dir" else None


def find_classifier(where: str, *, verify: bool = False) -> ModelSource:
    """Look up a trained model by a run folder, a model folder, `hf-hub:owner/name`, or a name with released weights.

    Args:
        where: The model; of a run folder its `model` folder is taken.
        verify: Compare the files of a repository on the Hub with what the Hub lists.

    Raises:
        RequestError: If it is none of these, or cannot be loaded as it is.
        RunError: If the Hub cannot be reached.
    """
    if where.startswith(("hf-hub:", "hf_hub:")):
        return find_model(where, pretrained=True, where=where, verify=verify)
    folder = Path(where.removeprefix("local-dir:")).expanduser()
    for candidate in (folder / "model", folder):
        if os.path.isfile(candidate / CONFIG):  # False for a name that is too long as well
            return find_model(f"local-dir:{candidate}", pretrained=True, where=where)
    if not os.path.lexists(folder) and timm.is_model(split_model_name_tag(where)[0]):
        return find_model(where, pretrained=True, where=where)
    if folder.suffix in (".onnx", ".xml", ".bin") and os.path.isfile(folder):
        raise RequestError(
            f"{printable(where)} is a file for another runtime: expected the folder that it was exported from; "
            "docs/how-to/export.md shows how to use it"
        )
    raise RequestError(
        f"{printable(where)} holds no trained model: expected the folder of a finished run, a folder with {CONFIG} and "
        f"{WEIGHTS}, or hf-hub:owner/repo"
    )


def find_model(
    requested: str, pretrained: bool | None = None, where: str | None = None, *, verify: bool = False
) -> ModelSource:
    """Look up a model, and its weights if they are wanted, without building it.

    Args:
        requested: A name that timm knows, with or without a tag; `hf-hub:owner/repo[@revision]`; `local-dir:folder`.
        pretrained: Whether to start from its weights; None means yes for the last two forms and no for a name.
        where: How messages name it; `--model REQUESTED` if not given.
        verify: Compare the files of a repository on the Hub with what the Hub lists.

    Raises:
        RequestError: If there is no such model, it has no weights, or only pickled ones, or its files do not fit
            together.
        RunError: If the Hub cannot be reached.
    """
    to_train = where is None
    where = printable(f"--model {requested}" if where is None else where)
    kind, name = _split_kind(requested, where)
    pretrained = kind is not None if pretrained is None else pretrained
    if kind is None:
        return _find_by_name(name, pretrained, where)
    if kind == "hf-hub":
        repo_id, at, revision = name.partition("@")
        if at:
            check_revision(f"{where}: {printable(revision) or 'nothing'} after @", revision)
        source = find_on_hub(
            repo_id, revision or None, pretrained=pretrained, where=where, verify=verify, to_train=to_train
        )
        return replace(source, requested=requested, base_id=name if pretrained else None)
    folder = _absolute(name)
    config, weights = folder / CONFIG, folder / WEIGHTS
    for path in (config, weights) if pretrained else (config,):
        if not os.path.lexists(path):
            raise RequestError(f"{where}: there is no {path.name} in {printable(folder)}")
    saved = read_model(where, config, weights if pretrained else None)
    return ModelSource(
        requested=f"local-dir:{folder}",
        saved=saved,
        base_id=local_name(folder) if pretrained else None,
        base_license=saved.config.pretrained_cfg["license"] if pretrained else None,
    )


def find_on_hub(
    repo_id: str, revision: str | None, *, pretrained: bool, where: str, verify: bool, to_train: bool = False
) -> ModelSource:
    """Fetch config.json and the weights of a repository on the Hub; see `find_model`.

    With `to_train`, errors also name the ways to train without them.
    """
    listing = list_files(where, repo_id, revision) if verify else None
    commit = revision if listing is None else listing.commit
    config = fetch_file(where, repo_id, CONFIG, commit, ", or take a model folder or a name" if to_train else "")
    commit = commit_of(config)  # both files of the same one, even if the repository moves on in between
    weights = fetch_file(where, repo_id, WEIGHTS, commit, _RANDOM if to_train else "") if pretrained else None
    if listing is not None:
        listing.check(where, {CONFIG: config, **({WEIGHTS: weights} if weights else {})})
    saved = read_model(where, config, weights)
    return ModelSource(
        requested=f"hf-hub:{repo_id}" + (f"@{revision}" if revision else ""),
        saved=saved,
        base_id=repo_id if pretrained else None,
        base_license=saved.config.pretrained_cfg["license"] if pretrained else None,
        revision=commit,
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
