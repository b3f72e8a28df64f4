"""Look up models by name, `hf-hub:owner/name` or `local-dir:folder`, and build them."""

import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, list_pretrained, split_model_name_tag
from torch import nn

from resnext_hub.errors import RequestError, setting
from resnext_hub.models.fetch import check_revision, commit_of, fetch_file, list_files
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.ood import OOD, OodScore
from resnext_hub.models.resnext import OWN_ARGUMENTS, VARIANTS, Variant, stock_architecture
from resnext_hub.models.saved import CONFIG, WEIGHTS, SavedModel, check_fit, named_config, read_model
from resnext_hub.models.views import TestTimeAugmentation
from resnext_hub.text import printable

_RANDOM = f", or start from random weights with {setting('pretrained', False)}"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model before it is built: its config, weights and origin."""

    requested: str
    """The model as the user requested it; a local folder with its absolute path."""
    saved: SavedModel
    base_id: str | None
    """Hub ID or folder name of the weights to start from; None for random weights."""
    base_license: str | None
    revision: str | None = None
    """Commit of the repository on the Hub."""

    @property
    def architecture(self) -> str:
        """timm architecture, or a variant of this package."""
        return self.saved.config.architecture

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments by which the model differs from its architecture."""
        return self.saved.config.model_args

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The pretrained config that the model states, by timm's keys."""
        return self.saved.config.pretrained_cfg

    @property
    def pretrained(self) -> bool:
        """Whether there are weights to start from."""
        return self.saved.weights is not None

    def load(self) -> "LoadedModel":
        """Load the model with its weights, as it was saved.

        Raises:
            RequestError: If it has no classifier, or its weights hold invalid values.
        """
        saved = self.saved
        if saved.config.num_classes < 1:
            raise RequestError(f"{saved.where} has no classes and returns features; expected a classifier")
        config = saved.config
        return LoadedModel(
            saved.load(),
            saved.input,
            saved.label_names,
            self,
            thresholds=config.thresholds,
            tta=config.tta,
            accept=config.accept,
            ood=saved.load_ood(),
        )


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its weights, preprocessing and class names."""

    model: nn.Module
    """In evaluation mode; maps normalized images `(N, C, H, W)` to logits `(N, classes)`."""
    input: InputConfig
    """Size and preprocessing of its images."""
    label_names: tuple[str, ...]
    """A name for each logit: as stated, ImageNet's for timm's ImageNet weights, else the class index."""
    source: ModelSource
    thresholds: tuple[float, ...] | None = None
    """Lowest probability at which each label is predicted, if an image can have several; None if it has exactly one."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation, as in the evaluation of its run: with `flip`, the mean of the logits of an image and its
    mirror image is the prediction."""
    temperature: float = 1.0
    """Divides the logits before the softmax or sigmoid; probabilities are less confident above 1. The weights of a
    calibrated model contain its temperature, so that this is 1."""
    accept: Mapping[float, float] = field(default_factory=dict)
    """For each precision, the lowest probability of an answer such that so many of the answers are right, fitted on
    the evaluation split of its run; empty if nothing was fitted."""
    ood: OodScore | None = None
    """Score of out-of-distribution images, from logits and features; None if the model folder contains none."""

    @property
    def accept_thresholds(self) -> Mapping[float, float]:
        """`accept`, or nothing if the probabilities are not those that it was fitted to."""
        as_fitted = self.temperature == 1 and self.tta == self.source.saved.config.tta
        return self.accept if as_fitted else {}

    @property
    def revision(self) -> str | None:
        """Commit on the Hub that it was loaded from; None if it was not."""
        return self.source.revision

    @property
    def folder(self) -> Path | None:
        """Absolute path of its model folder; None if it was not loaded from one."""
        kind, _, place = self.source.requested.partition(":")
        return Path(place) if kind == "local-dir" else None


def find_classifier(where: str, *, verify: bool = False) -> ModelSource:
    """Look up a trained model by a run folder, a model folder, `hf-hub:owner/name`, or a name with released weights.

    Args:
        where: The model; a run folder stands for its `model` folder.
        verify: Verify the files of a repository on the Hub against the hashes that the Hub lists.

    Raises:
        RequestError: If it is none of these, or it cannot be loaded.
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
            f"{printable(where)} is a file for another runtime; load it with that runtime, or use the folder from "
            "which it was exported"
        )
    raise RequestError(
        f"{printable(where)} is not a trained model: expected the folder of a finished run, a folder with {CONFIG} and "
        f"{WEIGHTS}, or hf-hub:owner/name"
    )


def find_model(
    requested: str, pretrained: bool | None = None, where: str | None = None, *, verify: bool = False
) -> ModelSource:
    """Look up a model, and its weights if requested, without building it.

    Args:
        requested: A timm name, with or without a tag; `hf-hub:owner/name[@revision]`; or `local-dir:folder`.
        pretrained: Whether to start from its weights; None means no for a name and yes otherwise.
        where: How messages name it; as the setting `model` if not given.
        verify: Verify the files of a repository on the Hub against the hashes that the Hub lists.

    Raises:
        RequestError: If there is no such model, it has no weights or only pickled ones, or its config does not match
            its weights.
        RunError: If the Hub cannot be reached.
    """
    to_train = where is None
    where = setting("model", requested) if where is None else printable(where)
    kind, name = _split_kind(requested, where)
    pretrained = kind is not None if pretrained is None else pretrained
    if kind is None:
        return _find_by_name(name, pretrained, where, to_train)
    if kind == "hf-hub":
        repo_id, at, revision = name.partition("@")
        if at:
            check_revision(f"{where}: {printable(revision) or 'an empty string'} after @", revision)
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

    With `to_train`, errors also suggest alternatives for training.
    """
    listing = list_files(where, repo_id, revision) if verify else None
    commit = revision if listing is None else listing.commit
    config = fetch_file(where, repo_id, CONFIG, commit, ", or use a model folder or a name" if to_train else "")
    commit = commit_of(config)  # so both files come from the same commit, even after a push in between
    weights = fetch_file(where, repo_id, WEIGHTS, commit, _RANDOM if to_train else "") if pretrained else None
    if listing is not None:
        listing.check(where, {CONFIG: config, **({WEIGHTS: weights} if weights else {})})
    saved = read_model(where, config, weights)
    if saved.weights is not None and saved.config.ood_sha256 is not None:
        with contextlib.suppress(RequestError):  # the model loads without it
            fetch_file(where, repo_id, OOD, commit)  # into the same snapshot
    return ModelSource(
        requested=f"hf-hub:{repo_id}" + (f"@{revision}" if revision else ""),
        saved=saved,
        base_id=repo_id if pretrained else None,
        base_license=saved.config.pretrained_cfg["license"] if pretrained else None,
        revision=commit,
    )


def local_name(folder: Path) -> str:
    """Return a name for a model folder that is safe to publish: without the folders above the run or model."""
    folder = folder.expanduser().absolute()
    of_a_run = any(os.path.isfile(folder.parent / name) for name in ("record.json", "config.yaml"))
    return printable("/".join(folder.parts[-2:] if of_a_run else folder.parts[-1:]))


def _absolute(folder: str) -> Path:
    """Return the absolute path of a folder; a link itself is not resolved."""
    path = Path(os.path.expanduser(folder))
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _split_kind(requested: str, where: str) -> tuple[str | None, str]:
    """Split `hf-hub:owner/name` and `local-dir:folder`; a plain name has no kind.

    A path without a prefix is refused here because older versions of timm take its last part as a name.
    """
    prefix, colon, rest = requested.partition(":")
    if colon and rest and prefix in ("hf-hub", "hf_hub", "local-dir"):
        return prefix.replace("_", "-"), rest
    if colon or "/" in requested or os.sep in requested:
        raise RequestError(
            f"{where} is not the name of a model; use hf-hub:{printable(rest or prefix)} for a "
            f"repository on the Hub, or local-dir:{printable(rest or prefix)} for a folder"
        )
    return None, requested


def _find_by_name(name: str, pretrained: bool, where: str, to_train: bool) -> ModelSource:
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        raise RequestError(f"{where}: no such model; closest matches: {', '.join(_close_names(architecture))}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in list_pretrained(f"{architecture}.*")]
        raise RequestError(
            f"{where}: {architecture} has no weights tagged {printable(tag)}; available tags: "
            f"{', '.join(tags) or 'none'}"
        ) from error
    saved = SavedModel(where=where, config=named_config(architecture, cfg))
    base_id: str | None = saved.config.pretrained_cfg.get("hf_hub_id")
    if not pretrained:
        return ModelSource(requested=name, saved=saved, base_id=None, base_license=None)
    if not base_id:
        tagged = sorted({split_model_name_tag(known)[0] for known in list_pretrained("resnext*_g*")})
        raise RequestError(
            f"{where} has no released weights; use one of {', '.join(tagged)}{_RANDOM if to_train else ''}"
        )
    filename = saved.config.pretrained_cfg.get("hf_hub_filename") or WEIGHTS
    if not filename.endswith(".safetensors"):
        raise RequestError(f"{where}: its weights are in {filename}, but only safetensors are loaded")
    repo_id, _, revision = base_id.partition("@")
    weights = fetch_file(where, repo_id, filename, revision or None, _RANDOM if to_train else "")
    return ModelSource(
        requested=name,
        saved=check_fit(replace(saved, weights=weights)),
        base_id=base_id,
        base_license=saved.config.pretrained_cfg.get("license"),
    )


def _close_names(name: str) -> list[str]:
    """Return names to suggest: variants of the same depth first, then names with a similar spelling."""
    known = [*VARIANTS, *timm.list_models("resnext*"), *timm.list_models("resnet*")]
    lower = name.lower().replace("-", "")
    same = [known_name for known_name in known if known_name.startswith(lower)]
    if lower in ("resnext", "resnext50"):
        same = ["resnext_g32", *same]  # our names omit depth 50
    alike = difflib.get_close_matches(lower, [*known, *timm.list_models()], n=4)
    return list(dict.fromkeys([*same, *alike]))[:4] or list(VARIANTS)[:4]


def build_model(
    source: ModelSource, classes: int | Sequence[str], drop_rate: float = 0.0, drop_path_rate: float = 0.0
) -> nn.Module:
    """Build a model for a set of classes, with its weights if the source has any.

    Args:
        source: The model.
        classes: Class names in order, or the number of classes. A saved classifier for the same classes is kept.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth rate.

    Raises:
        RequestError: If the architecture does not accept the arguments, or weights are not finite.
    """
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
    return source.saved.start(names, drop_rate, drop_path_rate)


def variant_of(source: ModelSource) -> Variant | None:
    """Return the variant that a source builds, under any of its names, or None if it is not a variant."""
    if source.architecture in VARIANTS:
        return VARIANTS[source.architecture] if not source.model_args else None
    for variant in VARIANTS.values():
        stock = stock_architecture(variant)
        if stock is not None and (stock.name, stock.model_args) == (source.architecture, source.model_args):
            return variant
    return None


def portable_architecture(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Return the architecture and arguments to publish: in terms of stock timm wherever possible."""
    if source.architecture in VARIANTS and not OWN_ARGUMENTS & source.model_args.keys():
        stock = stock_architecture(VARIANTS[source.architecture])
        if stock is not None:
            return stock.name, {**stock.model_args, **source.model_args}
    return source.architecture, dict(source.model_args)


def needs_plugin(architecture: str) -> bool:
    """Return whether building an architecture requires `import resnext_hub`."""
    return architecture in VARIANTS
