"""Pictures of a run, from its record and its evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.data.dataset import Pictures
from resnext_hub.record import RunRecord
from resnext_hub.training.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_POINTS = 30
"""Log lines up to which each is marked."""

MOST_CLASSES = 40
"""Beyond this, class names and counts in a confusion matrix could not be read."""


def write_plots(record: RunRecord, folder: Path) -> None:
    """Write curves.png and confusion_matrix.png."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(record).savefig(folder / "curves.png", dpi=110, metadata={"Software": None})
    plot_confusion(record).savefig(folder / "confusion_matrix.png", dpi=110, metadata={"Software": None})


def plot_curves(record: RunRecord) -> "Figure":
    """Draw training and evaluation loss, accuracy, and the learning rate over the epochs."""
    from matplotlib.figure import Figure

    steps = [line for line in record.history if "loss" in line]
    evaluations = [line for line in record.history if "eval_loss" in line]
    at = [line["epoch"] for line in evaluations]
    figure = Figure(figsize=(7.8, 2.9), layout="constrained")  # legible where a page shows it 600 pixels wide
    loss, accuracy, rate = figure.subplots(1, 3)

    marker = "." if len(steps) < FEW_POINTS else ""  # a single point makes no line
    loss.plot(
        [s["epoch"] for s in steps],
        [s["loss"] for s in steps],
        color="C0",
        alpha=0.7,
        marker=marker,
        label="training (augmented)",
    )
    loss.plot(at, [e["eval_loss"] for e in evaluations], "o-", color="C1", markersize=3, label="evaluation")
    loss.set(title="Loss (nats)", xlabel="epoch")
    loss.set_ylim(bottom=0.0)
    loss.legend(frameon=False, loc="upper right", fontsize=8)

    accuracy.plot(at, [100 * e["eval_top1"] for e in evaluations], "o-", color="C1", markersize=3)
    best = record.evaluation
    accuracy.plot([best.epoch], [100 * best.top1], "o", color="C3", markersize=8, fillstyle="none")
    accuracy.set(title=f"Top-1, at best {100 * best.top1:.2f} %", xlabel="epoch")

    rate.plot([s["epoch"] for s in steps], [s["lr"] for s in steps], color="C2", marker=marker)
    rate.set(title="Learning rate", xlabel="epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (loss, accuracy, rate):
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def plot_samples(
    pictures: Pictures, evaluation: Evaluation, label_names: Sequence[str], path: Path, count: int = 24
) -> None:
    """Draw evaluation pictures with what they are and what they are taken for, the surest mistakes first."""
    from matplotlib.figure import Figure

    wrong = evaluation.labels != evaluation.predictions
    order = np.lexsort((-evaluation.probabilities, ~wrong))
    sure = order[: min(count // 2, int(wrong.sum()))]
    right = np.flatnonzero(~wrong)
    spread = right[np.linspace(0, len(right) - 1, min(count - len(sure), len(right))).astype(np.int64)]
    shown = [*sure, *spread]
    rows = -(-len(shown) // 8)
    figure = Figure(figsize=(11, 1.75 * rows), layout="constrained")
    for axes, entry in zip(
        np.ravel(figure.subplots(rows, 8, squeeze=False)), [*shown, *[None] * (rows * 8)], strict=False
    ):
        axes.axis("off")
        if entry is None:
            continue
        axes.imshow(pictures.image(int(evaluation.indices[entry])), interpolation="nearest")
        is_, taken = (label_names[int(n)][:14] for n in (evaluation.labels[entry], evaluation.predictions[entry]))
        text = f"{is_} as {taken}" if wrong[entry] else is_
        color = "C3" if wrong[entry] else "black"
        axes.set_title(f"{text}\n{100 * evaluation.probabilities[entry]:.0f} %", fontsize=8, color=color)
    if len(sure):
        figure.suptitle("red: true class as predicted, surest first; black: right; with its probability", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_confusion(record: RunRecord) -> "Figure":
    """Draw the confusion matrix, each row in parts of its class, with counts where they can be read."""
    from matplotlib.figure import Figure

    counts = record.evaluation.matrix
    classes = len(counts)
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    legible = classes <= MOST_CLASSES
    side = min(max(4.0, 0.42 * classes + 2.0), 12.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(parts, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set(title="Confusion matrix", xlabel="predicted", ylabel="true")
    if legible:
        names = [name if len(name) <= 18 else name[:17] + "…" for name in record.label_names]
        rotation = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(classes), names, rotation=rotation)
        axes.set_yticks(range(classes), names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if parts[row, column] > 0.5 else "black"
            size = 9 if classes <= 20 else 6
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=size)
    figure.colorbar(image, ax=axes, shrink=0.7, label="part of the true class")
    return figure
