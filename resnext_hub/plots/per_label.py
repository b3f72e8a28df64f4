"""Average precision of each label of a run on images that can have several."""

from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.theme import LIGHT, WIDTH, Theme
from resnext_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 40
"""Number of labels that are drawn; of more, those with the lowest average precision."""


def plot_per_label(
    record: RunRecord,
    letters: Lettering,
    theme: Theme = LIGHT,
    *,
    most: int = MOST_LABELS,
    width: float = WIDTH,
) -> "Figure":
    """Draw the average precision of each label beside how often it occurs, lowest first.

    Raises:
        ValueError: If no label occurs among the images.
    """
    from matplotlib.figure import Figure

    facts, names = record.reported.labels or [], record.label_names
    measured = [(label.average_precision, i) for i, label in enumerate(facts) if label.average_precision is not None]
    if not measured:
        raise ValueError("no image has a label")
    shown = sorted(measured)[:most]
    figure = Figure(figsize=(width, 1.6 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    some = "" if len(shown) == len(measured) else f", the lowest {len(shown)} of {len(measured)} labels"
    part = "evaluation" if record.test is None else "test"
    places = np.arange(len(shown))
    values = np.array([value for value, _ in shown])
    positives = np.array([facts[i].positives for _, i in shown])
    axes.barh(places, 100 * values, height=0.7, color="C0")
    axes.plot(100 * positives / record.reported.count, places, "|", color=theme.ink, markersize=11, label="guessing")
    axes.set_yticks(places, [letters.name(names, i, 26) for _, i in shown], fontsize=8)
    for place, value, count in zip(places.tolist(), values.tolist(), positives.tolist(), strict=True):
        axes.text(101, place, f"{100 * value:.1f} % ({count})", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(title=f"Average precision{some}", xlim=(0, 118), xticks=range(0, 101, 20))
    axes.set_xlabel(f"percent; in parentheses, the number of {part} images with the label" + letters.note(names))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower left", fontsize=8)
    return figure
