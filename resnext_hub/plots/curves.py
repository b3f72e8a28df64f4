"""Curves of a run: loss, accuracy, learning rate and throughput over the epochs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.theme import PAGE_WIDTH
from resnext_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_POINTS = 30
"""Number of log lines below which every point gets a marker."""

_POINTS: dict[str, Any] = dict(color="C1", marker="o", markersize=3, zorder=3)
"""Style of the evaluations."""


def plot_curves(record: RunRecord, letters: Lettering) -> "Figure":
    """Draw training and evaluation loss, top-1 accuracy, and the learning rate over the epochs.

    Raises:
        ValueError: If the run logged no metrics.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 3.1))  # legible where a page shows it 600 pixels wide
    margins = dict(left=0.06, right=0.98, bottom=0.24, top=0.9, wspace=0.28)
    loss, accuracy, rate = figure.subplots(1, 3, gridspec_kw=margins)
    _draw(record, loss, accuracy, rate)
    figure.legend(frameon=False, loc="lower left", fontsize=8, ncols=2)
    return figure


def plot_four_curves(record: RunRecord, letters: Lettering) -> "Figure":
    """Draw the same curves and the throughput, two in a row.

    Raises:
        ValueError: If the run logged no metrics.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PAGE_WIDTH, 5.0), layout="constrained")
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2)
    _draw(record, loss, accuracy, rate)
    lines = [line for line in record.history if "images_per_second" in line]
    x, y = [line["epoch"] for line in lines], [line["images_per_second"] for line in lines]
    _line(speed, x, y, color="C4", marker=_marker(lines))
    speed.set(title="Throughput (images/s)" if lines else "Throughput (not logged)", xlabel="epoch")
    speed.set_ylim(bottom=0.0)
    _tidy(speed)
    figure.legend(frameon=False, loc="outside lower left", fontsize=8, ncols=2)
    return figure


def _draw(record: RunRecord, loss: Any, accuracy: Any, rate: Any) -> None:
    steps = [line for line in record.history if "loss" in line]
    evaluations = [line for line in record.history if "eval_loss" in line]
    at = [line["epoch"] for line in evaluations]
    if not record.history:
        raise ValueError("the run logged no metrics")
    marker = _marker(steps)
    epochs = [s["epoch"] for s in steps]
    _line(loss, epochs, [s["loss"] for s in steps], color="C0", alpha=0.7, marker=marker, label="training (augmented)")
    _line(loss, at, [e["eval_loss"] for e in evaluations], label="evaluation", **_POINTS)
    best = record.evaluation
    loss.set(title="Binary cross-entropy" if best.is_multi_label else "Cross-entropy loss", xlabel="epoch")
    loss.set_ylim(bottom=0.0)

    key, what = ("eval_map", "mAP") if best.is_multi_label else ("eval_top1", "Top-1 accuracy")
    value = best.top1 if best.mean_average_precision is None else best.mean_average_precision
    _line(accuracy, at, [100 * e[key] for e in evaluations], **_POINTS)
    _line(accuracy, [best.epoch], [100 * value], marker="o", color="C3", markersize=8, fillstyle="none")
    kept = "last" if record.config.get("best_by") == "last" else "best"
    accuracy.set(title=f"{what} ({kept} {100 * value:.2f} %)", xlabel="epoch")

    _line(rate, epochs, [s["lr"] for s in steps], color="C2", marker=marker)
    rate.set(title="Learning rate", xlabel="epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (loss, accuracy, rate):
        _tidy(axes)


def _marker(lines: Sequence[object]) -> str:
    return "." if len(lines) < FEW_POINTS else ""  # a single point draws no line


def _tidy(axes: Any) -> None:
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _line(axes: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw a line without clipping its markers at the edges; matplotlib cannot place an unclipped line of no points."""
    if x:
        axes.plot(x, y, clip_on=False, **style)
