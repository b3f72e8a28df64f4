"""Training on classes of unequal size: weights in the loss, balanced sampling, or adjusted logits."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from resnext_hub.data.images import IndexedImages, StreamedImages, count_labels
from resnext_hub.errors import RequestError, setting
from resnext_hub.settings import Range, check_fields, shown
from resnext_hub.text import listing
from resnext_hub.yaml_files import read_yaml

BETA = 0.999
"""Parameter of the effective number of samples; Cui et al. (2019) use 0.9 to 0.9999."""

IMBALANCED = 10.0
"""Ratio of the largest to the smallest class from which a dataset is called imbalanced."""


SMALL_CLASS = 10
"""Evaluation images below which a class is too small to evaluate: its accuracy moves in steps of 10 % or more."""


_BYTES = 1 << 22
"""Largest file of class weights."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Class imbalance."""

    class_weights: str = "none"
    """Weight the loss by class: auto for weights inversely proportional to the effective number of images (Cui et al.,
    2019), a YAML file with one `class: weight` per line, or none."""
    sampling: Literal["natural", "balanced"] = "natural"
    """How often images are drawn in an epoch: natural draws each image once; balanced draws all classes equally often,
    so images of small classes are repeated."""
    logit_adjustment: Annotated[float, Range(0, 100)] = 0.0
    """Strength of logit adjustment (Menon et al., 2021): during training, this multiple of the logarithm of each
    class's frequency is added to its logit; 1 corrects for the imbalance, 0 disables the adjustment."""
    best_by: Literal["top1", "macro-recall", "macro-f1", "map", "loss", "last"] | None = None
    """Metric that selects the best weights of the run on the evaluation split: top-1 accuracy, mean recall or F1 score
    over the classes, mean average precision (map), or the loss. last uses the weights at the end of the run instead, so
    that the evaluation results are not biased by the selection. If not given, last with --folds (except with
    --early-stopping); otherwise top1, or map if an image can have several labels."""

    def __post_init__(self) -> None:
        check_fields(self)
        corrections = [
            shown
            for shown, used in (
                (setting("class_weights", "auto"), self.class_weights == "auto"),
                (setting("sampling", "balanced"), self.sampling == "balanced"),
                (setting("logit_adjustment", self.logit_adjustment), self.logit_adjustment > 0),
            )
            if used
        ]
        if len(corrections) > 1:
            raise RequestError(
                f"{' and '.join(corrections)} correct for the same imbalance and would overcorrect together; use only "
                "one of them"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """Class weights and frequencies of a run, arrays `(classes,)` float64; None if they are not used."""

    class_weights: np.ndarray | None = None
    log_prior: np.ndarray | None = None
    """Logarithm of each class's frequency in the training split."""

    @property
    def digest(self) -> str | None:
        """A digest of the class weights, to compare runs and processes by; None without weights."""
        return digest_of(None if self.class_weights is None else self.class_weights.tolist())


def digest_of(class_weights: Sequence[float] | None) -> str | None:
    """Return a digest of class weights, to the precision of a record."""
    if class_weights is None:
        return None
    return hashlib.sha256(json.dumps([round(weight, 6) for weight in class_weights]).encode()).hexdigest()[:8]


def is_imbalanced(images: IndexedImages | StreamedImages) -> bool:
    """Return whether the classes of a training split are imbalanced; False for a stream, or with several labels."""
    if isinstance(images, StreamedImages) or images.is_multi_label:
        return False
    counts = np.unique(images.labels, return_counts=True)[1]
    return bool(counts.max() >= IMBALANCED * counts.min())


def effective_numbers(counts: np.ndarray) -> np.ndarray:
    """Return the effective number of samples of each class, (1 - beta^n) / (1 - beta) (Cui et al., 2019)."""
    return (1 - BETA ** counts.astype(np.float64)) / (1 - BETA)


def resolve_balance(
    config: BalanceConfig, train: IndexedImages | StreamedImages, label_names: tuple[str, ...]
) -> Balance:
    """Return the class weights and frequencies that a run uses.

    Raises:
        RequestError: If the file of weights is invalid, or a stream would have to be counted.
    """
    if train.is_multi_label:
        _reject_corrections(config)
    elif config.best_by == "map":
        raise RequestError(
            f"{setting('best_by', 'map')} is for images that can have several labels; use top1, macro-recall, macro-f1 "
            "or loss"
        )
    counts = np.ones(len(label_names), dtype=np.int64)
    if isinstance(train, StreamedImages):
        if config.class_weights == "auto":
            raise _uncountable(setting("class_weights", "auto"))
        if config.sampling == "balanced":
            raise _uncountable(setting("sampling", "balanced"))
        if config.logit_adjustment:
            raise _uncountable(setting("logit_adjustment"))
    else:
        counts = count_labels(train.labels, len(label_names))
    weights = None
    if config.class_weights == "auto":
        # a class without images has no effect; the weight of a single one keeps the division defined
        weights = 1 / effective_numbers(np.maximum(counts, 1))
        weights *= len(weights) / weights.sum()
    elif config.class_weights != "none":
        weights = _read_weights(Path(os.path.expanduser(config.class_weights)), label_names)
    frequencies = np.maximum(counts, 0.5) / counts.sum()
    return Balance(class_weights=weights, log_prior=np.log(frequencies) if config.logit_adjustment else None)


def _reject_corrections(config: BalanceConfig) -> None:
    """Raise RequestError for settings that need exactly one label per image."""
    for name, neutral in (("class_weights", "none"), ("sampling", "natural"), ("logit_adjustment", 0.0)):
        value = getattr(config, name)
        if value != neutral:
            raise RequestError(
                f"{setting(name, shown(value))} needs exactly one label per image, but images of this dataset can have "
                "several; omit this setting"
            )
    if config.best_by == "top1":
        raise RequestError(
            f"{setting('best_by', 'top1')} needs exactly one label per image, but images of this dataset can have "
            "several; use map, macro-f1, macro-recall or loss"
        )


def _uncountable(what: str) -> RequestError:
    return RequestError(f"{what} needs the number of images of each class, which a stream does not provide; omit it")


def _read_weights(path: Path, label_names: tuple[str, ...]) -> np.ndarray:
    where = setting("class_weights", shown(str(path)))
    try:
        content = read_yaml(
            path, "expected auto, none, or a file with one `class: weight` per line", most=_BYTES, any_names=True
        )
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    unknown = [name for name in content if name not in label_names]
    missing = [name for name in label_names if name not in content]
    if unknown or missing:
        what = f"has no weight for {listing(missing, 4)}" if missing else f"has unknown classes: {listing(unknown, 4)}"
        raise RequestError(f"{where} {what}; expected a weight for each of the {len(label_names)} classes")
    for name, weight in content.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6:
            raise RequestError(f"{where}: the weight of {shown(name)} is {shown(weight)}; expected 0 to 1e6")
    weights = np.array([float(content[name]) for name in label_names])
    if not weights.any():
        raise RequestError(f"{where}: all weights are 0; expected at least one positive weight")
    return weights
