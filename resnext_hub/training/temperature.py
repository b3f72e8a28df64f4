"""Temperature scaling (Guo et al., 2017, arXiv 1706.04599): one number that makes probabilities fit frequencies."""

import math

import numpy as np

FOLDS = 5
"""Parts of the images, for cross-fitting."""

FEWEST = 50
"""Fewest images for which a temperature is fitted."""

BINS = 15
"""Bins of equal width for the expected calibration error."""

_RANGE = (0.05, 20.0)
"""Smallest and largest temperature."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest cross-entropy.

    Args:
        logits: `(N, classes)`.
        labels: Classes, `(N,)`, or which labels each image has, `(N, classes)` bool.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return _cross_entropy(logits / math.exp(log_temperature), labels)

    low, high = map(math.log, _RANGE)
    return math.exp(float(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def cross_fitted(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return logits divided by temperatures that were fitted on other images, in `FOLDS` parts drawn at random."""
    part = np.random.default_rng(seed).permutation(len(logits)) % FOLDS
    scaled = np.empty_like(logits)
    for fold in range(FOLDS):
        inside = part == fold
        scaled[inside] = logits[inside] / fit_temperature(logits[~inside], labels[~inside])
    return scaled


def certainties(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each prediction and whether it is right, or with several labels that of each label."""
    if labels.ndim == 2:
        from scipy.special import expit

        return np.asarray(expit(logits)).ravel(), labels.ravel()
    from scipy.special import softmax

    return np.asarray(softmax(logits, axis=1)).max(axis=1), logits.argmax(axis=1) == labels


def calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error, 0 to 1: the mean gap between probability and frequency, over 15 bins.

    Args:
        probabilities: Probability of each prediction, `(N,)`.
        right: Whether it is right, `(N,)` bool.
    """
    bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=right.astype(np.float64) - probabilities, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    if labels.ndim == 2:
        return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())
    from scipy.special import log_softmax

    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())
