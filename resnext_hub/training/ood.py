"""Fit the score of out-of-distribution images to a trained model; see `resnext_hub.models.ood`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from resnext_hub.data.images import IndexedImages
from resnext_hub.models.ood import OodScore
from resnext_hub.training.features import compute_features, sampled, select
from resnext_hub.training.plan import Plan
from resnext_hub.training.temperature import FEWEST

if TYPE_CHECKING:
    from accelerate import Accelerator

DIRECTIONS = 64
"""Directions of the features whose variance is measured; the variance of the others is neglected."""

ACCEPTED = 0.95
"""Fraction of the held-out images whose score is at most 0."""

_IMAGES = 1000
"""Training images whose features are used, or five per class if that is more; and as many held-out images."""

_MOST_IMAGES = 20_000

_MOST_VALUES = 20_000_000
"""Largest number of values of the class means: 80 MB."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedOod:
    """A fitted score, and what it was standardized to."""

    score: OodScore
    held_out: np.ndarray
    """Scores of held-out images, `(M,)`."""
    certainties: np.ndarray
    """Largest probabilities of the same images, `(M,)`."""


def fit_ood(plan: Plan, model: nn.Module, accelerator: "Accelerator") -> FittedOod | None:
    """Fit the score of a model, or return None if there is none.

    There is none for images with several labels, streamed datasets, fewer than 50 readable held-out images, a
    model without features, or one with too many classes to keep their means.

    Args:
        plan: The run.
        model: The model with the weights that are published.
        accelerator: The accelerator of this process; every process takes part.
    """
    splits, classes = plan.splits, len(plan.splits.label_names)
    train, held_out = splits.train, splits.eval
    if splits.is_multi_label or not isinstance(train, IndexedImages) or not isinstance(held_out, IndexedImages):
        return None
    if not hasattr(model, "forward_head") or classes * int(getattr(model, "num_features", 0)) > _MOST_VALUES:
        return None
    most = min(max(_IMAGES, 5 * classes), _MOST_IMAGES)
    parts = []
    for images in (train, held_out):
        chosen = select(images, sampled(len(images), most, plan.config.seed))
        found = compute_features(plan, chosen, model, accelerator, logits=True)
        assert found.logits is not None
        parts.append((found.values[0][found.read], found.logits[found.read], chosen.labels[found.read]))
    (features, _, labels), (own, logits, _) = parts
    from scipy.special import softmax

    if len(own) < FEWEST or len(features) < 2 or not np.isfinite(features).all():
        return None
    score = build_score(features, labels, own, logits)
    scores = score(torch.from_numpy(logits), torch.from_numpy(own)).numpy()
    return FittedOod(score=score, held_out=scores, certainties=softmax(logits, axis=1).max(axis=1))


def build_score(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, logits: np.ndarray) -> OodScore:
    """Build the score from features.

    Args:
        features: Features of training images, `(N, F)`.
        labels: Their classes, `(N,)`; a class without images has no mean.
        held_out: Features of held-out images, `(M, F)`, to which the score is standardized.
        logits: Their logits, `(M, classes)`.
    """
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    values = torch.from_numpy(features).double()
    mean = values.mean(dim=0)
    shifted = values - mean
    index = torch.from_numpy(inverse)
    sums = torch.zeros(len(classes), shifted.shape[1], dtype=torch.float64).index_add_(0, index, shifted)
    centers = sums / torch.from_numpy(counts)[:, None]
    within = shifted - centers[index]
    variances, directions = principal(within)
    typical = max(float(within.square().mean()), 1e-12)
    shrink = 1 - (typical / (variances + typical)).sqrt()
    score = OodScore(
        mean=mean,
        directions=directions,
        shrink=shrink,
        centers=centers - (centers @ directions.T * shrink) @ directions,
        standard=torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]),
    )
    with torch.no_grad():
        given = torch.from_numpy(logits).float(), torch.from_numpy(held_out).float()
        constants: list[float] = []
        for part in score.parts(*given):
            low, median, high = part.double().quantile(torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64)).tolist()
            constants += [median, max((high - low) / 2, 1e-6)]
        score.standard.copy_(torch.tensor([*constants, 0.0]))
        score.standard[4] = score(*given).quantile(ACCEPTED)
    return score


def principal(shifted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest variances `(k,)` of centered vectors `(N, F)`, and their directions `(k, F)`."""
    count = min(DIRECTIONS, *shifted.shape)
    values, vectors = torch.linalg.eigh(shifted.T @ shifted / len(shifted))
    return values.flip(0)[:count].clamp(min=0), vectors.T.flip(0)[:count].contiguous()
