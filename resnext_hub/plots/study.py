"""Plots of a study: accuracy against cardinality and time, and training curves with a band over seeds."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.write import save_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY_PLOTS = {
    "accuracy.png": "Accuracy with 95 % intervals, against cardinality and against measured training time",
    "curves.png": "Training and validation error by epoch, mean and range over the seeds",
}
"""Files of the plots, and what each shows."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One member of a study."""

    name: str
    cardinality: int
    accuracy: float
    """Mean over the seeds, in percent."""
    half_width: float | None
    """Half the width of its 95 % interval; None with one seed."""
    minutes: float
    """Mean wall time of a run."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Errors of a member by epoch, in percent: lists of (epoch, mean, lowest, highest) over its seeds."""

    name: str
    training: list[tuple[float, float, float, float]]
    validation: list[tuple[float, float, float, float]]

    @classmethod
    def of(cls, name: str, histories: Sequence[Sequence[Mapping[str, Any]]]) -> "Curve":
        """Average the metrics of several runs, at the epochs of their evaluations.

        The training error at an evaluation is the mean since the evaluation before, on augmented images.
        """
        errors = [_errors(history) for history in histories]
        return cls(
            name=name,
            training=_over_runs([training for training, _ in errors]),
            validation=_over_runs([validation for _, validation in errors]),
        )


def write_study_plots(folder: Path, points: Sequence[Point], curves: Sequence[Curve], title: str) -> list[str]:
    """Write the plots of a study; return the names of the files that were written.

    Args:
        folder: Where to write them.
        points: The members with finished runs.
        curves: Their training curves.
        title: Title of the study.
    """
    if not points:
        return []
    names = tuple(point.name for point in points)
    draw = {"accuracy.png": partial(_plot_accuracy, points, title), "curves.png": partial(_plot_curves, curves, title)}
    return [name for name, function in draw.items() if save_plot(folder / name, names, function)]


def _plot_accuracy(points: Sequence[Point], title: str, letters: Lettering) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_group = len({point.cardinality for point in points}) == len(points)
    for index, point in enumerate(points):
        style: dict[str, Any] = dict(color=f"C{index % 10}", fmt="o", markersize=5, capsize=3, clip_on=False)
        error = 0.0 if point.half_width is None else point.half_width
        left.errorbar(point.cardinality if by_group else index, point.accuracy, yerr=error, **style)
        right.errorbar(point.minutes, point.accuracy, yerr=error, label=point.name, **style)
    if by_group:
        left.set_xscale("log", base=2)
        left.set_xticks([p.cardinality for p in points], [p.name for p in points])
        left.minorticks_off()
        left.set_xlabel("cardinality x width (log scale)")
    else:
        left.set_xticks(range(len(points)), [_wrapped(point.name) for point in points], fontsize=8)
        left.set_xlim(-0.5, len(points) - 0.5)
    left.set_ylabel("accuracy, %")
    right.set_xlabel("minutes of training per run, measured")
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}: mean over seeds, 95 % interval", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _plot_curves(curves: Sequence[Curve], title: str, letters: Lettering) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        for errors, style, what in ((curve.training, "--", "training"), (curve.validation, "-", "validation")):
            if not errors:
                continue
            epochs, means, lows, highs = zip(*errors, strict=True)
            axes.plot(epochs, means, style, color=f"C{index % 10}", linewidth=1.5, label=f"{curve.name}, {what}")
            axes.fill_between(epochs, lows, highs, color=f"C{index % 10}", alpha=0.12, linewidth=0)
    axes.set(xlabel="epoch", ylabel="top-1 error, %", title=f"{title}: mean and range over seeds")
    axes.set_ylim(bottom=0.0)
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    return figure


def _wrapped(name: str) -> str:
    """Return a name in short lines, so that neighboring ones do not overlap."""
    return textwrap.fill(name, 11)


def _errors(history: Sequence[Mapping[str, Any]]) -> tuple[dict[float, float], dict[float, float]]:
    """Return the training error since the evaluation before, and the validation error, in percent by epoch."""
    training, validation = dict[float, float](), dict[float, float]()
    since = list[float]()
    for line in history:
        if "eval_top1" in line:
            validation[line["epoch"]] = 100 * (1 - line["eval_top1"])
            if since:
                training[line["epoch"]] = sum(since) / len(since)
            since = []
        elif "top1" in line:
            since.append(100 * (1 - line["top1"]))
    return training, validation


def _over_runs(runs: Sequence[Mapping[float, float]]) -> list[tuple[float, float, float, float]]:
    found = []
    for epoch in sorted({epoch for run in runs for epoch in run}):
        values = [run[epoch] for run in runs if epoch in run]
        found.append((epoch, sum(values) / len(values), min(values), max(values)))
    return found
