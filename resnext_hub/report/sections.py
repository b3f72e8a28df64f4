"""The parts of a report: what each shows, or why it cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.facts import CalibrationFacts
from resnext_hub.plots.clusters import plot_clusters
from resnext_hub.plots.confusion import confused_pairs, plot_matrix, plot_pairs
from resnext_hub.plots.curves import plot_four_curves
from resnext_hub.plots.embedding import MOST_GROUPS, plot_embedding
from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.per_class import MOST_CLASSES, class_results, plot_per_class
from resnext_hub.plots.per_label import plot_per_label
from resnext_hub.plots.reliability import Confidences, plot_reliability
from resnext_hub.plots.theme import PAGE_WIDTH, Theme
from resnext_hub.record import RunRecord
from resnext_hub.report.outputs import Outputs
from resnext_hub.report.stored import Predictions
from resnext_hub.text import printable
from resnext_hub.training.temperature import FEWEST, certainties, cross_fitted, fit_temperature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX_CLASSES = 20
"""Number of classes up to which a confusion matrix has names and counts."""

CLUSTER_CLASSES = 2000
"""Number of classes up to which there is a matrix at all."""

PCA = 50
"""Dimensions to which embeddings are reduced before t-SNE."""

FEWEST_POINTS = 10
"""Fewest images whose embeddings are shown."""

Draw = Callable[[Lettering, Theme], "Figure"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plot:
    """A plot that is drawn in every theme."""

    name: str
    """Stem of its files."""
    alt: str
    """What it shows, for those who do not see it."""
    draw: Draw


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """A part of a report."""

    title: str
    text: str
    """How to read it, in plain text."""
    plots: tuple[Plot, ...] = ()
    missing: tuple[str, ...] = ()
    """Sentences about what is not shown, and why."""


def not_shown(title: str, what: str, reason: str) -> Section:
    """Return a section that only states why it is empty."""
    return Section(title=title, text="", missing=(f"{what} not shown: {reason}.",))


def curves(record: RunRecord) -> Section:
    """Return the section on the course of the training."""
    if not record.history:
        return not_shown("Training", "Curves are", "the run logged no metrics")
    if not record.steps:
        return not_shown("Training", "Curves are", "only the classifier was fitted, so there were no training steps")
    best = record.evaluation
    alt = (
        f"Loss, accuracy, learning rate and throughput over {record.epochs:.4g} epochs; the best weights are those of "
        f"epoch {best.epoch:.4g}, with {100 * best.top1:.2f} % of {best.count} evaluation images correct."
    )
    text = "The circle marks the published weights. Throughput excludes evaluation and checkpoints."
    plot = Plot(name="curves", alt=alt, draw=lambda letters, _: plot_four_curves(record, letters))
    return Section(title="Training", text=text, plots=(plot,))


def confusion(record: RunRecord) -> Section:
    """Return the section on classes that are confused with each other."""
    title, names, classes = "Confusions", record.label_names, len(record.label_names)
    if record.reported.is_multi_label:
        return not_shown(title, "The confusion matrix is", "an image can have several labels")
    pairs = confused_pairs(record)
    worst = "no image is classified incorrectly"
    if pairs:
        count, label, other = pairs[0]
        often = "once" if count == 1 else f"{count} times"
        worst = f"most frequently, {printable(names[label])} is mistaken for {printable(names[other])} ({often})"
    if classes <= MATRIX_CLASSES:
        shape = (PAGE_WIDTH, min(5.6, 2.4 + 0.32 * classes))
        plot = Plot(
            name="confusion",
            alt=f"Confusion matrix of {classes} classes; {worst}.",
            draw=lambda letters, theme: plot_matrix(record, letters, theme, shape),
        )
        text = "Rows are true classes, columns are predicted classes."
        return Section(title=title, text=text, plots=(plot,))
    most = Plot(
        name="confusions",
        alt=f"The most frequent confusions of {classes} classes; {worst}.",
        draw=lambda letters, _: plot_pairs(record, letters, PAGE_WIDTH),
    )
    if classes > CLUSTER_CLASSES:
        most_classes = f"it is drawn for at most {CLUSTER_CLASSES:,} classes, not {classes:,}"
        reason = f"The confusion matrix is not shown: {most_classes}."
        return Section(title=title, text="", plots=(most,), missing=(reason,))
    matrix = Plot(
        name="confusion",
        alt=f"Confusion matrix of {classes} classes, ordered by clustering; {worst}.",
        draw=partial(plot_clusters, record),
    )
    text = "Classes are ordered by clustering: those that are confused with each other are neighbors."
    return Section(title=title, text=text, plots=(matrix, most))


def classes(record: RunRecord) -> Section:
    """Return the section on the results for each class."""
    several, results = record.reported.is_multi_label, class_results(record)
    title, what = ("Labels", "labels") if several else ("Classes", "classes")
    if not results:
        return not_shown(title, "Results are", "no image has a label")
    shown = min(len(results), MOST_CLASSES)
    lowest = ", ".join(f"{printable(record.label_names[r.label])} ({100 * r.recall:.0f} %)" for r in results[:3])
    bars = Plot(
        name="classes",
        alt=f"Recall and precision of {shown} of {len(results)} {what}; lowest recall: {lowest}.",
        draw=partial(plot_per_class, record),
    )
    if not several:
        return Section(title=title, text="", plots=(bars,))
    value = 100 * (record.reported.mean_average_precision or 0)
    precision = Plot(
        name="average_precision",
        alt=f"Average precision of each label; the mean is {value:.1f} %.",
        draw=partial(plot_per_label, record, most=MOST_CLASSES, width=PAGE_WIDTH),
    )
    return Section(title=title, text="", plots=(bars, precision))


def reliability(record: RunRecord, stored: Predictions | str, outputs: Outputs | str) -> Section:
    """Return the section on how far probabilities can be trusted.

    Args:
        record: The run.
        stored: Predictions of the split, or why there are none.
        outputs: Outputs of the model for some of its images, or why there are none.
    """
    title = "Reliability"
    if not isinstance(outputs, str) and len(outputs.labels) < FEWEST:
        outputs = f"{len(outputs.labels)} images are too few to fit a temperature"
    if not isinstance(outputs, str):
        panels, text = _calibrated(outputs, record.calibration)
        return _reliability(panels, text)
    if isinstance(stored, str):
        return not_shown(title, "The reliability diagram is", stored)
    right = stored.labels.ravel() if stored.several else ~stored.wrong
    before = Confidences(title="As published", probabilities=stored.probabilities.ravel(), right=right)
    section = _reliability([before], "With perfect calibration, all points are on the dashed line.")
    return replace(section, missing=(f"The diagram after calibration is not shown: {outputs}.",))


def _calibrated(outputs: Outputs, known: CalibrationFacts | None) -> tuple[list[Confidences], str]:
    labels = outputs.labels
    logits = outputs.logits * (1.0 if known is None else known.temperature)
    panels = [
        Confidences(title=name, probabilities=probabilities, right=right)
        for name, (probabilities, right) in (
            ("As trained", certainties(logits, labels)),
            ("With a temperature (cross-fitted)", certainties(cross_fitted(logits, labels), labels)),
        )
    ]
    text = (
        "With perfect calibration, all points are on the dashed line. On the right, logits are divided by a "
        f"temperature that is fitted on four fifths of the {len(labels):,} images and applied to the remaining fifth, "
        "for each fifth in turn. "
    )
    if known is not None:
        fitted = f"a temperature of {known.temperature:.2f}, fitted on {known.images:,} evaluation images"
        return panels, f"{text}The published weights include {fitted}."
    temperature = fit_temperature(outputs.logits, labels)
    use = f"to use it in Python: dataclasses.replace(classifier, temperature={temperature:.2f})"
    return panels, f"{text}Fitted on all of these images, the temperature is {temperature:.2f}; {use}."


def _reliability(panels: Sequence[Confidences], text: str) -> Section:
    errors = " and ".join(f"{panel.title.lower()} {100 * panel.error:.1f} %" for panel in panels)
    alt = f"Reliability diagram; expected calibration error: {errors}."
    plot = Plot(name="reliability", alt=alt, draw=lambda _, theme: plot_reliability(panels, theme))
    return Section(title="Reliability", text=text, plots=(plot,))


def embeddings(record: RunRecord, outputs: Outputs | str) -> Section:
    """Return the section on the embeddings of images."""
    title = "Embeddings"
    if isinstance(outputs, str):
        return not_shown(title, "Embeddings are", outputs)
    count = len(outputs.labels)
    if count < FEWEST_POINTS:
        return not_shown(title, "Embeddings are", f"{count} images are too few")
    points, names = _flattened(outputs.embeddings), record.label_names
    text = (
        f"The inputs of the classifier layer for {count:,} images, in two dimensions (PCA, then t-SNE). Images "
        "that the model finds similar are close together; distances between clusters mean little."
    )
    if outputs.labels.ndim == 2:
        number = np.minimum(outputs.labels.sum(axis=1), 3).astype(np.int64)
        labels = ["no label", "1 label", "2 labels", "3 or more labels"]
        draw: Draw = lambda _, theme: plot_embedding(points, number, labels, np.zeros(count, dtype=bool), theme)  # noqa: E731
        text += " The color is the number of labels."
    else:
        wrong = outputs.logits.argmax(axis=1) != outputs.labels
        shown = list(range(len(names)))
        if len(names) > MOST_GROUPS:
            results = sorted(class_results(record), key=lambda result: result.correct - result.count)
            shown = [result.label for result in results][:MOST_GROUPS]
        groups = np.full(count, -1)
        for group, label in enumerate(shown):
            groups[outputs.labels == label] = group
        if len(names) > MOST_GROUPS:
            text += f" The {MOST_GROUPS} classes with the most mistakes are shown in color."

        def draw(letters: Lettering, theme: Theme) -> "Figure":
            return plot_embedding(points, groups, [letters.name(names, i, 18) for i in shown], wrong, theme)

    alt = f"Embeddings of {count} images of {len(names)} classes in two dimensions."
    return Section(title=title, text=text, plots=(Plot(name="embeddings", alt=alt, draw=draw),))


def _flattened(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings in two dimensions, `(N, 2)`."""
    from sklearn.decomposition import PCA as Reduction
    from sklearn.manifold import TSNE

    count, features = embeddings.shape
    reduced = Reduction(min(PCA, count, features), random_state=0).fit_transform(embeddings.astype(np.float64))
    perplexity = min(30.0, (count - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced))
