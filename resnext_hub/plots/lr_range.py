"""The losses of a learning rate range test."""

from typing import TYPE_CHECKING

from resnext_hub.training.lr_range import RangeTest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_range_test(test: RangeTest, lr: float) -> "Figure":
    """Draw the loss over the learning rate, with the suggestion.

    Args:
        test: The range test.
        lr: The peak learning rate of the run without the suggestion.

    Raises:
        ValueError: If the first loss was not finite.
    """
    from matplotlib.figure import Figure

    if not test.losses:
        raise ValueError("the first loss was not finite")
    figure = Figure(figsize=(7.8, 3.6), layout="constrained")  # legible where a page shows it 600 pixels wide
    axes = figure.subplots()
    axes.plot(test.lrs, test.losses, color="C0", alpha=0.35, linewidth=1, label="loss of each step")
    axes.plot(test.lrs, test.smoothed, color="C0", linewidth=2, label="smoothed")
    axes.axvline(lr, color="gray", linestyle=":", label=f"current value: {lr:.3g}")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color="C1", linestyle="--", label=f"suggestion: {test.suggestion:.3g}")
    low, high = min(test.losses), max(test.smoothed[0], 2 * min(test.smoothed))  # what diverges is cut off
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Training loss at an increasing learning rate")
    axes.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure
