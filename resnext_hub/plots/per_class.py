"""Recall and precision of each class of a run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.theme import LIGHT, PAGE_WIDTH, Theme
from resnext_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 20
"""Number of classes that are drawn; of more, those with the lowest recall."""


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """The results for a class, or for one of several labels."""

    label: int
    count: int
    """Images of the class."""
    predicted: int
    """Images for which it is predicted."""
    correct: int
    """Images of the class for which it is predicted."""

    @property
    def recall(self) -> float:
        """Fraction of its images for which it is predicted, 0 to 1; 0 if it has none."""
        return self.correct / max(self.count, 1)

    @property
    def precision(self) -> float:
        """Fraction of the predictions that are right, 0 to 1; 0 if it is never predicted."""
        return self.correct / max(self.predicted, 1)


def class_results(record: RunRecord) -> list[ClassResult]:
    """Return the results of the classes that have images, the lowest recall first."""
    facts = record.reported
    if facts.labels is not None:
        rows = [(fact.positives, fact.predicted, fact.true_positives) for fact in facts.labels]
    else:
        predicted = [0] * len(facts.confusion)
        for columns in facts.confusion:
            for column, count in columns:
                predicted[column] += count
        correct = [dict(columns).get(label, 0) for label, columns in enumerate(facts.confusion)]
        rows = list(zip(facts.measured, predicted, correct, strict=True))
    results = [ClassResult(label=i, count=a, predicted=b, correct=c) for i, (a, b, c) in enumerate(rows) if a]
    return sorted(results, key=lambda result: (result.recall, result.precision, result.label))


def plot_per_class(record: RunRecord, letters: Lettering, theme: Theme = LIGHT) -> "Figure":
    """Draw the recall and the precision of each class, the lowest recall first.

    Raises:
        ValueError: If no class has images.
    """
    from matplotlib.figure import Figure

    every, names = class_results(record), record.label_names
    if not every:
        raise ValueError("no class has images")
    shown = every[:MOST_CLASSES]
    figure = Figure(figsize=(PAGE_WIDTH, 1.3 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))
    axes.barh(places - 0.18, [100 * r.recall for r in shown], height=0.34, color="C0", label="recall")
    axes.barh(places + 0.18, [100 * r.precision for r in shown], height=0.34, color="C1", label="precision")
    axes.set_yticks(places, [letters.name(names, result.label, 26) for result in shown], fontsize=8)
    for place, result in enumerate(shown):
        axes.text(101, place, f"{result.correct}/{result.count}", va="center", fontsize=8)
    axes.set(xlim=(0, 114), ylim=(len(shown) - 0.4, -0.6), xticks=range(0, 101, 20))
    axes.set_title(
        "Recall and precision"
        + ("" if len(shown) == len(every) else f" ({len(shown)} of {len(every)}, lowest recall first)"),
        fontsize=10,
    )
    axes.set_xlabel("percent; at the right, correct / all images of the class" + letters.note(names), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower left", fontsize=8, ncols=2)
    return figure
