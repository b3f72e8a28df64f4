"""Confusion matrix of a run, or its most confused pairs of classes."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.theme import LIGHT, WIDTH, Theme
from resnext_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 40
"""Number of classes above which a matrix is illegible and the most confused pairs are drawn instead."""

MOST_PAIRS = 20
"""Number of pairs that are drawn instead of the matrix."""


def plot_confusion(record: RunRecord, letters: Lettering) -> "Figure":
    """Draw the confusion matrix with normalized rows, or the most confused pairs if there are many classes."""
    return plot_matrix(record, letters) if len(record.label_names) <= MOST_CLASSES else plot_pairs(record, letters)


def plot_matrix(
    record: RunRecord, letters: Lettering, theme: Theme = LIGHT, shape: tuple[float, float] | None = None
) -> "Figure":
    """Draw the confusion matrix with normalized rows.

    Args:
        record: The run.
        letters: Fonts for the class names.
        theme: Colors.
        shape: Width and height in inches; depends on the number of classes if not given.
    """
    from matplotlib.figure import Figure

    counts = record.reported.matrix
    classes = len(counts)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size, cell_size = (10, 9) if classes <= 20 else (8, 6)
    if shape is None:
        shape = (min(max(4.0, 0.42 * classes + 2.0), 12.0),) * 2
    else:
        size, cell_size = 8, min(9, int(36 * min(shape) / classes))
    figure = Figure(figsize=shape, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap=theme.matrix, vmin=0.0, vmax=1.0)
    axes.set(title="Confusion matrix", xlabel="predicted" + letters.note(record.label_names), ylabel="true")
    names = [letters.name(record.label_names, index, 18) for index in range(classes)]
    axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = theme.on_high if fractions[row, column] > 0.5 else theme.ink
        text = str(counts[row, column])
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=cell_size)
    figure.colorbar(image, ax=axes, shrink=0.7, label="fraction of the true class")
    return figure


def plot_pairs(record: RunRecord, letters: Lettering, width: float = WIDTH) -> "Figure":
    """Draw the most confused pairs of classes, the most frequent one first."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measured, names = record.reported.measured, record.label_names
    pairs = confused_pairs(record)[:MOST_PAIRS]
    figure = Figure(figsize=(width, 1.4 + 0.3 * max(len(pairs), 2)), layout="constrained")
    axes = figure.subplots()
    titled = axes.set_title if width >= WIDTH else partial(figure.suptitle, fontsize=10)
    titled(f"Most frequent confusions of {len(names)} classes (true as predicted)")
    axes.set_xlabel(f"{'evaluation' if record.test is None else 'test'} images" + letters.note(names))
    if not pairs:
        axes.text(0.5, 0.5, "all images were classified correctly", ha="center", transform=axes.transAxes)
    positions = range(len(pairs))
    axes.barh(positions, [count for count, *_ in pairs], color="C0")
    texts = [f"{letters.name(names, true, 26)} as {letters.name(names, predicted, 26)}" for _, true, predicted in pairs]
    axes.set_yticks(positions, texts, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for position, (count, label, _) in enumerate(pairs):
        axes.text(count, position, f" {count}/{measured[label]}", va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def confused_pairs(record: RunRecord) -> list[tuple[int, int, int]]:
    """Return how often each class is predicted for another: count, true and predicted class, most frequent first."""
    measured = record.reported.measured
    pairs = [
        (count, label, prediction)
        for label, row in enumerate(record.reported.confusion)
        for prediction, count in row
        if prediction != label
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], -pair[0] / measured[pair[1]], *pair[1:]))
