"""Confusion matrix of many classes, with those that are confused with each other side by side."""

from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.theme import LIGHT, PAGE_WIDTH, Theme
from resnext_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CELLS = 200
"""Cells in a row of the plot; of more classes, several share a cell, which then shows the highest of their values."""


def plot_clusters(record: RunRecord, letters: Lettering, theme: Theme = LIGHT) -> "Figure":
    """Draw the confusion matrix with normalized rows, with the classes in an order that shows groups of them."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = record.reported.matrix
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = clustered_order(fractions)
    cells = _largest_of_blocks(fractions[np.ix_(order, order)], -(-len(order) // MOST_CELLS))
    figure = Figure(figsize=(PAGE_WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap=theme.matrix, norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
    axes.set(title=f"Confusion matrix of {len(order)} classes", xlabel="predicted", ylabel="true", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, shrink=0.7, label="fraction of the true class", ticks=[0, 0.05, 0.2, 0.5, 1])
    return figure


def clustered_order(fractions: np.ndarray) -> np.ndarray:
    """Return the classes in an order in which those that are confused with each other are neighbors.

    It is that of the leaves of an average-linkage clustering, in which classes are the closer the larger the fractions
    that are confused.

    Args:
        fractions: Confusion matrix with normalized rows, `(classes, classes)`.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    confused = fractions + fractions.T
    np.fill_diagonal(confused, 0)
    if not confused.any():
        return np.arange(len(fractions))
    distances = 1 - confused / confused.max()
    np.fill_diagonal(distances, 0)
    return np.asarray(leaves_list(linkage(squareform(distances, checks=False), "average")))


def _largest_of_blocks(values: np.ndarray, side: int) -> np.ndarray:
    """Return the largest value of each block of `side` rows and columns."""
    edges = np.arange(0, len(values), side)
    return np.maximum.reduceat(np.maximum.reduceat(values, edges, axis=0), edges, axis=1)
