"""Fit the classifier to features of the training images, computed once: a linear probe before the first step."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resnext_hub.data.images import IndexedImages
from resnext_hub.errors import RunError
from resnext_hub.models.saved import classifier_names
from resnext_hub.processes.peers import Peers
from resnext_hub.training.features import compute_features, sampled, select
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)

MOST_IMAGES = 20_000
"""Images to compute features of; a larger training split is sampled."""

_COMPARED = 1000
"""Images to choose the regularization by."""

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C to choose from, the inverse strength of the L2 regularization of standardized features."""

_DEFAULT_STRENGTH = 1e-2
"""C if classes have too few images to compare values."""

_FOLDS = 3


def fit_head(plan: Plan, model: nn.Module, accelerator: "Accelerator", peers: Peers) -> None:
    """Replace the weights of the classifier of a model by those of a logistic regression on its features.

    Features are the inputs of the classifier layer, of each image as in evaluation, and of its mirror image if the run
    mirrors images. The strength of the regularization is chosen by cross-validation within the training split.

    Args:
        plan: The run; its training split is not streamed.
        model: The model, with a linear classifier; only that is changed.
        accelerator: The accelerator of this process.
        peers: The processes of the run; each computes a part of the features.

    Raises:
        RunError: If no image is readable.
    """
    images = plan.splits.train
    assert isinstance(images, IndexedImages)
    rows = sampled(len(images), MOST_IMAGES, plan.config.seed)
    _logger.info("fitting the classifier to the features of %d training images", len(rows))
    chosen = select(images, rows)
    computed = compute_features(plan, chosen, model, accelerator, mirrored=plan.config.transform.hflip > 0)
    features, read = computed.values, computed.read
    if not read.any():
        raise RunError("none of the training images is readable, so the classifier cannot be fitted", everywhere=True)
    names = sorted(classifier_names(model), reverse=True)  # weight, bias

    def solve() -> dict[str, torch.Tensor]:
        from threadpoolctl import threadpool_limits

        # its number of threads changes the last bits, and launchers set it
        with threadpool_limits(torch.get_num_threads(), "blas"):
            weight, bias = _solve(features[:, read], chosen.labels[read], plan)
        found = dict(zip(names, (weight, bias), strict=False))
        own = model.state_dict()
        return {name: torch.from_numpy(value).float().view(own[name].shape) for name, value in found.items()}

    with torch.no_grad():
        for name, value in peers.share_tensors(solve).items():
            model.get_parameter(name).copy_(value)


def _solve(features: np.ndarray, labels: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return weight `(classes, features)` and bias `(classes,)` of the classifier.

    Args:
        features: Features of each view, `(views, N, features)`.
        labels: Labels `(N,)`, or `(N, classes)` bool.
        plan: The run.
    """
    classes = len(plan.splits.label_names)
    mean = features.mean(axis=(0, 1))
    scale = features.std(axis=(0, 1))
    scale[scale < 1e-6 * max(scale.max(), 1e-12)] = np.inf  # a constant feature says nothing
    scaled = (features - mean) / scale
    if labels.ndim == 2 or plan.config.loss == "bce":
        targets = labels if labels.ndim == 2 else np.eye(classes, dtype=bool)[labels]
        solved = [_fit(scaled, targets[:, label].astype(np.int64), 2, plan, label) for label in range(classes)]
        weight, bias = np.concatenate([w[1:] - w[:1] for w, _ in solved]), np.array([b[1] - b[0] for _, b in solved])
    else:
        weight, bias = _fit(scaled, labels, classes, plan)
        if plan.balance.log_prior is not None:
            bias = bias - plan.config.balance.logit_adjustment * plan.balance.log_prior
    weight = weight / scale
    return weight, bias - weight @ mean


def _fit(
    features: np.ndarray, labels: np.ndarray, classes: int, plan: Plan, label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of a logistic regression for mutually exclusive classes.

    A class without images gets a bias by which it is never predicted.

    Args:
        features: Standardized features of each view, `(views, N, features)`.
        labels: Labels, `(N,)`.
        classes: Number of classes.
        plan: The run, for weights of the classes.
        label: The label to tell from all others, if there are two classes.
    """
    weight = np.zeros((classes, features.shape[2]))
    counts = np.bincount(labels, minlength=classes)
    bias = np.full(classes, -np.log(len(labels) + 1.0))
    found = np.flatnonzero(counts)
    if len(found) < 2:
        bias[found] = np.log(len(labels) + 1.0)
        return weight, bias
    importance = _importance(labels, plan) if label is None else np.ones(len(labels))
    strength = _strength(features[0], labels, importance, plan.config.seed)
    # to the optimum, which unlike the way there does not depend on the rounding of features
    solver = _regression(strength, tolerance=1e-7)
    views = len(features)
    every = np.concatenate(list(features)).astype(np.float64)
    solver.fit(every, np.tile(labels, views), np.tile(importance, views) / views)
    own, offset = solver.coef_, solver.intercept_
    if len(found) == 2:
        own, offset = np.concatenate([-own / 2, own / 2]), np.concatenate([-offset / 2, offset / 2])
    weight[found], bias[found] = own, offset
    missing = counts == 0
    bias[missing] += bias[found].min()
    return weight, bias


def _importance(labels: np.ndarray, plan: Plan) -> np.ndarray:
    """Return the weight of each image, `(N,)`, with a mean of 1, by the run's correction for imbalance."""
    counts = np.bincount(labels, minlength=len(plan.splits.label_names))
    weights = np.ones(len(counts)) if plan.balance.class_weights is None else plan.balance.class_weights
    if plan.config.balance.sampling == "balanced":
        weights = 1 / np.maximum(counts, 1)
    every: np.ndarray = weights[labels] / max(float(weights[labels].mean()), 1e-12)
    return every


def _regression(strength: float, tolerance: float = 1e-4) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000, tol=tolerance)


def _strength(features: np.ndarray, labels: np.ndarray, importance: np.ndarray, seed: int) -> float:
    """Return the value of `STRENGTHS` with the lowest loss in cross-validation.

    Args:
        features: Standardized features, `(N, features)`.
        labels: Labels, `(N,)`.
        importance: Weights, `(N,)`.
        seed: Seed of the folds.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    rows = np.random.default_rng(seed).permutation(len(labels))[:_COMPARED]
    known, counts = np.unique(labels[rows], return_counts=True)
    rows = rows[np.isin(labels[rows], known[counts >= _FOLDS])]
    known = known[counts >= _FOLDS]
    if len(known) < 2:
        return _DEFAULT_STRENGTH
    losses = np.zeros(len(STRENGTHS))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        for fitted, left in folds.split(rows, labels[rows]):
            for number, strength in enumerate(STRENGTHS):
                solver = _regression(strength)
                some, others = rows[fitted], rows[left]
                solver.fit(features[some], labels[some], importance[some])
                guesses = solver.predict_proba(features[others])
                losses[number] += log_loss(labels[others], guesses, sample_weight=importance[others], labels=known)
    return STRENGTHS[int(losses.argmin())]
