"""Confident learning: find labels that a model contradicts (Northcutt et al., 2021, arXiv 1911.00068).

An image counts as confidently of a class if the probability of the class is at least the mean that the model assigns to
it on the images with that label. The number of images that are confidently of another class than their label yields an
estimate of the number of wrong labels, and as many images are flagged: those whose label is the least probable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOP = 20
"""Classes whose probabilities are kept for each image, so memory does not grow with the number of classes. All others
have a probability below 1/20."""


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Predictions of a model for N images, reduced to the K most probable classes of each."""

    own: np.ndarray
    """Probability of the label, `(N,)` float32; NaN for an unreadable image."""
    classes: np.ndarray
    """The most probable classes, the first one first, `(N, K)` int64."""
    values: np.ndarray
    """Their probabilities, `(N, K)` float32."""

    @classmethod
    def of_batch(cls, rows: torch.Tensor, labels: torch.Tensor) -> "Probabilities":
        """Reduce the probabilities `(N, classes)` of images with the labels `(N,)`."""
        values, classes = rows.sort(dim=1, descending=True, stable=True)  # ties go to the lower class
        own = rows.gather(1, labels[:, None])[:, 0]
        return cls(own.float().numpy(), classes[:, :TOP].numpy().copy(), values[:, :TOP].float().numpy())

    @classmethod
    def joined(cls, parts: "Sequence[Probabilities]") -> "Probabilities":
        """Join batches."""
        return cls(
            np.concatenate([part.own for part in parts]),
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.values for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Flagged:
    """Images whose labels are probably wrong, the least probable label first."""

    images: np.ndarray
    """Their indices, `(F,)` int64."""
    suggested: np.ndarray
    """The most probable class of each of them, `(F,)` int64."""
    probabilities: np.ndarray
    """Its probability, `(F,)` float32."""
    estimate: float
    """Estimated number of wrong labels among all images; at least F, up to rounding."""


def find_wrong_labels(labels: np.ndarray, found: Probabilities, classes: int) -> Flagged:
    """Find images whose labels are probably wrong.

    Args:
        labels: The labels of N images, `(N,)` int64.
        found: The predictions for them.
        classes: Number of classes.
    """
    readable = np.flatnonzero(~np.isnan(found.own))
    labels, own = labels[readable], found.own[readable]
    candidates, values = found.classes[readable], found.values[readable]
    estimate = _estimate(labels, own, candidates, values, classes)
    # The paper also ranks by the margin to the most probable other class. The probability of the label alone is better:
    # on Fashion-MNIST with 5 % of the labels flipped, 90 % of the first K images are flipped ones, K being the number
    # of these, against 79 % with the margin, which is large for hard images of two similar classes as well. Taking as
    # many images from each class as are estimated for it (prune by class) yields 90 %, by noise rate 86 %.
    first = np.argsort(own, kind="stable")[: round(estimate)]
    flagged = first[candidates[first, 0] != labels[first]]
    return Flagged(readable[flagged], candidates[flagged, 0], values[flagged, 0], estimate)


def _estimate(labels: np.ndarray, own: np.ndarray, candidates: np.ndarray, values: np.ndarray, classes: int) -> float:
    """Return the estimated number of wrong labels, from the confident joint (equations 1 to 3).

    For each label, the fraction of images of another class among the confident ones is taken for that among all; this
    sums the off-diagonal of the calibrated joint.
    """
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.full(classes, np.inf)  # no image is confidently of a class without images
    np.divide(sums, counts, out=thresholds, where=counts > 0)
    passes = values >= thresholds[candidates]
    confident = np.flatnonzero(passes.any(axis=1))
    place = passes[confident].argmax(axis=1)  # the most probable class of those that pass
    wrong = candidates[confident, place] != labels[confident]
    joint = np.bincount(labels[confident], minlength=classes)
    off_diagonal = np.bincount(labels[confident], weights=wrong, minlength=classes)
    return float((counts * off_diagonal / np.maximum(joint, 1)).sum())
