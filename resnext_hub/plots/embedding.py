"""Embeddings of images in two dimensions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.plots.theme import LIGHT, PAGE_WIDTH, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_GROUPS = 10
"""Groups that have a color of their own."""


def plot_embedding(
    points: np.ndarray, groups: np.ndarray, names: Sequence[str], wrong: np.ndarray, theme: Theme = LIGHT
) -> "Figure":
    """Draw a point for each image, in the color of its group.

    Args:
        points: `(N, 2)`.
        groups: Group of each image, `(N,)`; -1 for those without a color.
        names: Names of the groups as matplotlib draws them, at most `MOST_GROUPS`.
        wrong: Whether the prediction for each image is wrong, `(N,)` bool.
        theme: Colors.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PAGE_WIDTH, 5.4), layout="constrained")
    axes = figure.subplots()
    x, y = points.T
    size = float(np.clip(6000 / max(len(points), 1), 5, 30))
    for group in (-1, *range(len(names))):
        inside = groups == group
        if not inside.any():
            continue
        color = theme.faint if group < 0 else theme.cycle[group]
        label = "other classes" if group < 0 else names[group]
        axes.scatter(
            x[inside], y[inside], s=size, color=color, alpha=0.35 if group < 0 else 0.8, linewidths=0, label=label
        )
    if wrong.any():
        axes.scatter(
            x[wrong], y[wrong], s=1.5 * size, marker="x", color=theme.ink, linewidths=0.8, label="wrong prediction"
        )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.legend(frameon=False, loc="outside lower left", fontsize=8, ncols=4, markerscale=1.5)
    return figure
