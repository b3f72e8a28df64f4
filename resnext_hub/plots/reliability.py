"""Reliability diagram: the fraction of correct predictions at each confidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.plots.theme import LIGHT, PAGE_WIDTH, Theme
from resnext_hub.training.temperature import BINS, calibration_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Confidences:
    """Predictions with their probabilities, and whether they are correct."""

    title: str
    probabilities: np.ndarray
    """`(N,)`, 0 to 1."""
    right: np.ndarray
    """`(N,)` bool."""

    @property
    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of predictions, mean probability and fraction of right ones in each bin; 0 in empty bins."""
        places = np.minimum((self.probabilities * BINS).astype(np.int64), BINS - 1)
        counts = np.bincount(places, minlength=BINS)
        sums = (np.bincount(places, weights=values, minlength=BINS) for values in (self.probabilities, self.right))
        mean, accuracy = (total / np.maximum(counts, 1) for total in sums)
        return counts, mean, accuracy

    @property
    def error(self) -> float:
        """Expected calibration error, 0 to 1."""
        return calibration_error(self.probabilities, self.right) if len(self.right) else 0.0


def plot_reliability(panels: Sequence[Confidences], theme: Theme = LIGHT) -> "Figure":
    """Draw up to two reliability diagrams side by side, each above a histogram of the probabilities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PAGE_WIDTH, 4.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row", gridspec_kw=dict(height_ratios=(3, 1)))
    for column, axes in enumerate(grid.T):
        if column < len(panels):
            _draw(panels[column], axes[0], axes[1], theme)
        else:
            for unused in axes:
                unused.axis("off")
    grid[0][0].set_ylabel("fraction correct")
    grid[1][0].set_ylabel("share")
    return figure


def _draw(panel: Confidences, diagram: Any, histogram: Any, theme: Theme) -> None:
    counts, mean, accuracy = panel.bins
    filled, edges = counts > 0, np.arange(BINS) / BINS
    diagram.bar(edges[filled], accuracy[filled], width=1 / BINS, align="edge", color="C0", edgecolor=theme.paper)
    diagram.plot([0, 1], [0, 1], linestyle="--", color=theme.faint, linewidth=1)
    diagram.plot(mean[filled], accuracy[filled], "o", color=theme.ink, markersize=3, clip_on=False)
    diagram.set_title(f"{panel.title}\ncalibration error {100 * panel.error:.1f} %", fontsize=9)
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    histogram.bar(edges, counts / max(counts.sum(), 1), width=1 / BINS, align="edge", color="C0", edgecolor=theme.paper)
    histogram.set(xlabel="probability of the prediction", xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    for axes in (diagram, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
