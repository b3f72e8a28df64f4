"""Curves of a run: loss, accuracy and learning rate over the epochs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resnext_hub.plots.lettering import Lettering
from resnext_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_POINTS = 30
"""Number of log lines below which every point gets a marker."""


def plot_curves(record: RunRecord, letters: Lettering) -> "Figure":
    """Draw training and evaluation loss, top-1 accuracy, and the learning rate over the epochs.

    Raises:
        ValueError: If the run logged no metrics.
    """
    from matplotlib.figure import Figure

    steps = [line for line in record.history if "loss" in line]
    evaluations = [line for line in record.history if "eval_loss" in line]
    at = [line["epoch"] for line in evaluations]
    if not record.history:
        raise ValueError("the run logged no metrics")
    figure = Figure(figsize=(7.8, 3.1))  # legible where a page shows it 600 pixels wide
    margins = dict(left=0.06, right=0.98, bottom=0.24, top=0.9, wspace=0.28)
    loss, accuracy, rate = figure.subplots(1, 3, gridspec_kw=margins)

    marker = "." if len(steps) < FEW_POINTS else ""  # a single point draws no line
    epochs = [s["epoch"] for s in steps]
    points: dict[str, Any] = dict(color="C1", marker="o", markersize=3, zorder=3)
    _line(loss, epochs, [s["loss"] for s in steps], color="C0", alpha=0.7, marker=marker, label="training (augmented)")
    _line(loss, at, [e["eval_loss"] for e in evaluations], label="evaluation", **points)
    best = record.evaluation
    loss.set(title="Binary cross-entropy" if best.is_multi_label else "Cross-entropy loss", xlabel="epoch")
    loss.set_ylim(bottom=0.0)
    figure.legend(frameon=False, loc="lower left", fontsize=8, ncols=2)

    key, what = ("eval_map", "mAP") if best.is_multi_label else ("eval_top1", "Top-1 accuracy")
    value = best.top1 if best.mean_average_precision is None else best.mean_average_precision
    _line(accuracy, at, [100 * e[key] for e in evaluations], **points)
    _line(accuracy, [best.epoch], [100 * value], marker="o", color="C3", markersize=8, fillstyle="none")
    kept = "last" if record.config.get("best_by") == "last" else "best"
    accuracy.set(title=f"{what} ({kept} {100 * value:.2f} %)", xlabel="epoch")

    _line(rate, epochs, [s["lr"] for s in steps], color="C2", marker=marker)
    rate.set(title="Learning rate", xlabel="epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (loss, accuracy, rate):
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _line(axes: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw a line without clipping its markers at the edges; matplotlib cannot place an unclipped line of no points."""
    if x:
        axes.plot(x, y, clip_on=False, **style)
