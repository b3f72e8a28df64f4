"""The recipe `auto`: how to fine-tune pretrained weights, by the number of training images per class."""

from typing import Any

from resnext_hub.data.images import StreamedImages
from resnext_hub.data.splits import Splits
from resnext_hub.models.lookup import ModelSource
from resnext_hub.models.saved import without_values
from resnext_hub.processes.launcher import processes
from resnext_hub.runs.recipes import AUTO, RECIPES
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.finetune import has_linear_classifier

SETTINGS = frozenset({"batch_size"}.union(*(tier.settings for tier in RECIPES[AUTO].tiers)))
"""Settings that `auto` chooses."""


def choose(splits: Splits, source: ModelSource, config: TrainConfig) -> dict[str, Any]:
    """Choose how to fine-tune a model on a dataset.

    Args:
        splits: The images.
        source: The model, with pretrained weights.
        config: The configuration before the choice, which it must not contradict.

    Returns:
        Flat settings.
    """
    count = splits.train.count
    model = without_values(lambda: source.saved.build(len(splits.label_names), 0.0, 0.0))
    fits = has_linear_classifier(model) and not config.finetune.head_epochs
    fits = fits and not isinstance(splits.train, StreamedImages)
    saved = source.saved
    if saved.config.label_names is not None and saved.keeps_classifier(splits.label_names):
        fits = False  # a classifier for the same classes was probably trained on more images
    per_class = count / len(splits.label_names)
    tier = next(t for t in RECIPES[AUTO].tiers if per_class <= t.most and (fits or t.settings["epochs"]))
    settings = dict(tier.settings)
    if not fits:
        del settings["fit_head"]
    if count is not None:
        settings["batch_size"] = _batch_size(count)
    return settings


def _batch_size(count: int) -> int:
    """Return the global batch size for a number of images: 64, or 16 if there are few; a multiple of the processes."""
    wanted = 64 if count > 500 else 16
    return max(wanted // processes() // 2 * 2, 2) * processes()
