"""Fit how probable an answer has to be for a precision: answers below are unsure.

For each precision of a fixed list, the lowest probability is chosen at which the answers on held-out images are precise
enough with confidence, not only on average: the exact upper limit of the error rate (Clopper and Pearson, 1934) has to
be low enough. As selective classification does (Geifman and El-Yaniv, 2017, arXiv 1705.08500), candidates are bisected,
and the allowed chance of a mistake is divided by the number of steps.
"""

import math
from collections.abc import Mapping

import numpy as np

from resnext_hub.facts import AcceptanceFacts
from resnext_hub.training.temperature import FEWEST, FOLDS

PRECISIONS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Precisions for which a probability is fitted."""

REPORTED = (0.9, 0.95, 0.99)
"""Precisions whose coverage is measured."""

_CANDIDATES = 50
"""Fractions of the images that may be answered: this many, equally spaced."""

_RISK = 0.1
"""Chance that a precision is missed on new images like those of the fit."""


def fit_acceptance(probabilities: np.ndarray, right: np.ndarray) -> dict[float, float]:
    """Return the lowest probability of an accepted answer for each precision; those that cannot be met are missing.

    Args:
        probabilities: Probability of each answer, `(N,)`.
        right: Whether it is right, `(N,)` bool.
    """
    if len(right) < FEWEST:
        return {}
    found = ((precision, _lowest(probabilities, right, precision)) for precision in PRECISIONS)
    return {precision: lowest for precision, lowest in found if lowest is not None}


def measure_acceptance(
    accept: Mapping[float, float], probabilities: np.ndarray, right: np.ndarray
) -> list[AcceptanceFacts]:
    """Return how often answers are accepted, and right, on images that the probabilities were not fitted on.

    Args:
        accept: Lowest probability of an accepted answer for each precision.
        probabilities: Probability of each answer, `(N,)`.
        right: Whether it is right, `(N,)` bool.
    """
    return [
        _selected(precision, probabilities >= accept[precision], right) for precision in REPORTED if precision in accept
    ]


def cross_measure(probabilities: np.ndarray, right: np.ndarray, seed: int = 0) -> list[AcceptanceFacts]:
    """Return the same for the images of the fit: each part of them is measured with what was fitted on the others."""
    part = np.random.default_rng(seed).permutation(len(right)) % FOLDS
    accepted = {precision: np.zeros(len(right), dtype=bool) for precision in REPORTED}
    for fold in range(FOLDS):
        inside = part == fold
        found = fit_acceptance(probabilities[~inside], right[~inside])
        for precision, answers in accepted.items():
            answers[inside] = probabilities[inside] >= found.get(precision, np.inf)
    whole = fit_acceptance(probabilities, right)
    return [_selected(precision, accepted[precision], right) for precision in REPORTED if precision in whole]


def _selected(precision: float, accepted: np.ndarray, right: np.ndarray) -> AcceptanceFacts:
    return AcceptanceFacts(
        precision=precision,
        answered=int(accepted.sum()),
        right=int((accepted & right).sum()),
        count=len(right),
    )


def _lowest(probabilities: np.ndarray, right: np.ndarray, precision: float) -> float | None:
    """Return the lowest probability at which answers are precise enough, or None if there is none."""
    from scipy.stats import beta

    ascending = np.sort(probabilities)
    order = np.argsort(-probabilities, kind="stable")
    errors = np.cumsum(~right[order])
    sizes = np.ceil(np.arange(1, _CANDIDATES + 1) / _CANDIDATES * len(right)).astype(np.int64)
    # equally probable answers are accepted together
    sizes = np.unique(len(right) - np.searchsorted(ascending, probabilities[order[sizes - 1]]))
    risk = _RISK / (math.ceil(math.log2(len(sizes))) + 1)
    low, high, best = 0, len(sizes) - 1, 0
    while low <= high:
        middle = (low + high) // 2
        size = int(sizes[middle])
        wrong = int(errors[size - 1])
        limit = 1.0 if wrong == size else float(beta.ppf(1 - risk, wrong + 1, size - wrong))
        if limit <= 1 - precision:
            best, low = size, middle + 1
        else:
            high = middle - 1
    if not best:
        return None
    # rounded up, so that it is short where it is stored
    return 0.0 if best == len(right) else min(math.ceil(float(probabilities[order[best - 1]]) * 1e6) / 1e6, 1.0)
