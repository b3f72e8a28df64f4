"""Plots of a run, from its record and its evaluation.

A plot that fails is reported and left out: it never keeps a run from being finished.
"""

import contextlib
import logging
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, decode
from resnext_hub.data.images import IndexedImages
from resnext_hub.errors import one_line
from resnext_hub.record import PLOTS, RunRecord
from resnext_hub.text import plot_text, printable
from resnext_hub.training.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

_logger = logging.getLogger(__name__)

FEW_POINTS = 30
"""Log lines up to which each is marked."""

MOST_CLASSES = 40
"""Beyond this, names and counts in a confusion matrix could not be read: the most confused pairs are shown."""

MOST_PAIRS = 20
"""Pairs of classes that are shown in its place."""

THUMBNAIL = 256
"""Longest side in pixels of an image in the gallery."""

COLUMNS = 6
"""Images side by side in the gallery."""


def write_plots(record: RunRecord, folder: Path) -> list[str]:
    """Write curves.png and confusion_matrix.png; return the names of those that could be drawn."""
    names = tuple(record.label_names)
    drawn = []
    for name, draw in zip(PLOTS, (plot_curves, plot_confusion), strict=True):
        if save_plot(folder / name, names, partial(draw, record)):
            drawn.append(name)
    return drawn


def write_samples(
    images: IndexedImages,
    evaluation: Evaluation,
    label_names: Sequence[str],
    path: Path,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> bool:
    """Write a gallery of evaluation images, and return whether it could be drawn."""
    draw = partial(plot_samples, images, evaluation, label_names, max_pixels=max_pixels)
    return save_plot(path, tuple(label_names), draw)


@dataclass(frozen=True)
class Lettering:
    """How names are drawn with the fonts that are installed."""

    families: tuple[str, ...]
    characters: frozenset[int]
    """Code points that one of the families has."""

    def name(self, names: Sequence[str], index: int, width: int) -> str:
        """Return the name of a class as matplotlib draws it, at most so many characters wide.

        Characters that no font has become escapes; such names begin with the number of the class.
        """
        name = printable(names[index])
        drawn = "".join(c if ord(c) in self.characters else _escaped(c) for c in name)
        drawn = drawn if drawn == name else f"{index}: {drawn}"
        return plot_text(drawn if len(drawn) <= width else f"{drawn[: width - 1]}…")

    def note(self, names: Sequence[str]) -> str:
        """Say what became of names that cannot be drawn, if there are any."""
        whole = all(ord(c) in self.characters for name in names for c in printable(name))
        return "" if whole else "; names that no installed font has: escaped, after the class's number"


@lru_cache(maxsize=1)
def lettering(names: tuple[str, ...]) -> Lettering:
    """Choose installed fonts that have the characters of names, and say which characters none has."""
    from matplotlib.font_manager import findfont, fontManager

    default = "DejaVu Sans"  # which matplotlib brings along
    families, characters = [default], set(_characters(findfont(default)))
    missing = {ord(c) for name in names for c in printable(name)} - characters
    for font in fontManager.ttflist if missing else ():
        if font.name.startswith(("Last Resort", "STIX", "cm", "DejaVu")) or font.name in families:
            continue
        more = _characters(font.fname)
        if more & missing:
            families.append(font.name)
            characters |= more
            missing -= more
    drawn_as_nothing = {ord(c) for c in "\u200c\u200d\ufe0e\ufe0f"}
    if missing - drawn_as_nothing:
        some = "".join(map(chr, sorted(missing - drawn_as_nothing)[:8]))
        _logger.warning(
            "no installed font has %s (%d characters of class names): they are escaped in plots; packages such as "
            "fonts-noto-cjk have them",
            some,
            len(missing - drawn_as_nothing),
        )
    return Lettering(tuple(families), frozenset(characters))


@lru_cache(maxsize=4096)
def _characters(font: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # a font that is gone or damaged
        return frozenset()


def _escaped(character: str) -> str:
    return "" if character in "\u200c\u200d\ufe0e\ufe0f" else character.encode("unicode_escape").decode()


def save_plot(path: Path, names: tuple[str, ...], draw: Callable[[Lettering], "Figure"]) -> bool:
    """Draw a plot and write it; if that fails, report it, leave no file, and return False."""
    try:
        import matplotlib

        letters = lettering(names)
        with matplotlib.rc_context({"font.family": list(letters.families)}), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # such as of a layout that is tight
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(letters).savefig(path, dpi=110, metadata={"Software": None})
    except _FAILURES as error:
        _logger.warning("%s is left out, as it could not be drawn: %s", path.name, one_line(error))
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    return True


_FAILURES = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError, ImportError)
"""What matplotlib, its fonts, the disk and the memory can do to a plot."""


def plot_curves(record: RunRecord, letters: Lettering) -> "Figure":
    """Draw training and evaluation loss, accuracy, and the learning rate over the epochs."""
    from matplotlib.figure import Figure

    steps = [line for line in record.history if "loss" in line]
    evaluations = [line for line in record.history if "eval_loss" in line]
    at = [line["epoch"] for line in evaluations]
    if not record.history:
        raise ValueError("the run has no lines of metrics")
    figure = Figure(figsize=(7.8, 3.1), layout="constrained")  # legible where a page shows it 600 pixels wide
    loss, accuracy, rate = figure.subplots(1, 3)

    marker = "." if len(steps) < FEW_POINTS else ""  # a single point makes no line
    epochs = [s["epoch"] for s in steps]
    points: dict[str, Any] = dict(color="C1", marker="o", markersize=3, zorder=3)
    _line(loss, epochs, [s["loss"] for s in steps], color="C0", alpha=0.7, marker=marker, label="training (augmented)")
    _line(loss, at, [e["eval_loss"] for e in evaluations], label="evaluation", **points)
    loss.set(title="Loss (nats)", xlabel="epoch")
    loss.set_ylim(bottom=0.0)
    figure.legend(frameon=False, loc="outside lower left", fontsize=8, ncols=2)

    best = record.evaluation
    _line(accuracy, at, [100 * e["eval_top1"] for e in evaluations], **points)
    _line(accuracy, [best.epoch], [100 * best.top1], marker="o", color="C3", markersize=8, fillstyle="none")
    accuracy.set(title=f"Top-1, at best {100 * best.top1:.2f} %", xlabel="epoch")

    _line(rate, epochs, [s["lr"] for s in steps], color="C2", marker=marker)
    rate.set(title="Learning rate", xlabel="epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (loss, accuracy, rate):
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _line(axes: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw a line whose markers are whole at the edges; without points, one that is not clipped has no place."""
    if x:
        axes.plot(x, y, clip_on=False, **style)


def plot_samples(
    images: IndexedImages,
    evaluation: Evaluation,
    label_names: Sequence[str],
    letters: Lettering,
    max_pixels: int = MAX_IMAGE_PIXELS,
    count: int = 24,
) -> "Figure":
    """Draw evaluation images with true and predicted class, the most confident mistakes first."""
    from matplotlib.figure import Figure

    wrong = evaluation.labels != evaluation.predictions
    shown = _chosen(evaluation, wrong, count)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.4), layout="constrained")
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": (), "yticks": ()}))
    for axes in grid:
        axes.axis("off")
        axes.xaxis.set_visible(False)  # else ticks that nobody sees are laid out
        axes.yaxis.set_visible(False)
    for axes, entry in zip(grid, shown, strict=False):
        row = images.row(int(evaluation.indices[entry]))
        axes.imshow(thumbnail(row, max_pixels), interpolation="nearest")
        label, prediction = (
            letters.name(label_names, int(index), 22)
            for index in (evaluation.labels[entry], evaluation.predictions[entry])
        )
        sure = percent(float(evaluation.probabilities[entry]))
        text = f"{label}\nas {prediction}\n{sure}" if wrong[entry] else f"{label}\n{sure}"
        axes.set_title(text, fontsize=8, color="C3" if wrong[entry] else "black", y=1.0)
    words = "red: true class as predicted class; black: correct; with the predicted class's probability"
    if not wrong.any():
        words = "all are correct; with the probability"
    words += letters.note(label_names)
    figure.supxlabel(textwrap.fill(words, 24 * columns), fontsize=8)
    return figure


def _chosen(evaluation: Evaluation, wrong: np.ndarray, count: int) -> list[int]:
    """Return entries to show: at most half mistakes, the most confident first, and correct ones from everywhere."""
    order = np.lexsort((-evaluation.probabilities, ~wrong))
    sure = order[: min(count // 2, int(wrong.sum()))]
    right = np.flatnonzero(~wrong)
    spread = right[np.linspace(0, len(right) - 1, min(count - len(sure), len(right))).astype(np.int64)]
    return [int(entry) for entry in (*sure, *spread)]


def thumbnail(row: dict[str, Any] | None, max_pixels: int) -> "Image.Image":
    """Return a stored image made small, so that a gallery never holds more than one at full size."""
    from PIL import Image

    try:
        image = decode(row, "RGB", max_pixels)
    except UnreadableImageError:  # it was readable in evaluation, and has gone since
        return Image.new("RGB", (8, 8), "white")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def percent(part: float) -> str:
    """Return a fraction as a whole percentage, without rounding it to none or to all."""
    if 0.0 < part < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < part < 1.0 else f"{100 * part:.0f} %"


def plot_confusion(record: RunRecord, letters: Lettering) -> "Figure":
    """Draw the confusion matrix, each row in fractions of its class; of many classes, the most confused pairs."""
    return _plot_matrix(record, letters) if len(record.label_names) <= MOST_CLASSES else _plot_pairs(record, letters)


def _plot_matrix(record: RunRecord, letters: Lettering) -> "Figure":
    from matplotlib.figure import Figure

    counts = record.evaluation.matrix
    classes = len(counts)
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.42 * classes + 2.0), 12.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(parts, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set(title="Confusion matrix", xlabel="predicted" + letters.note(record.label_names), ylabel="true")
    names = [letters.name(record.label_names, index, 18) for index in range(classes)]
    size = 10 if classes <= 20 else 8
    axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if parts[row, column] > 0.5 else "black"
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            color=color,
            fontsize=9 if classes <= 20 else 6,
        )
    figure.colorbar(image, ax=axes, shrink=0.7, label="fraction of the true class")
    return figure


def _plot_pairs(record: RunRecord, letters: Lettering) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measured, names = record.evaluation.measured, record.label_names
    pairs = [
        (count, label, prediction)
        for label, row in enumerate(record.evaluation.confusion)
        for prediction, count in row
        if prediction != label
    ]
    pairs = sorted(pairs, key=lambda pair: (-pair[0], -pair[0] / measured[pair[1]], *pair[1:]))[:MOST_PAIRS]
    figure = Figure(figsize=(7.8, 1.4 + 0.3 * max(len(pairs), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set(title=f"Most confused of {len(names)} classes", xlabel="evaluation images" + letters.note(names))
    if not pairs:
        axes.text(0.5, 0.5, "every image was classified correctly", ha="center", transform=axes.transAxes)
    places = range(len(pairs))
    axes.barh(places, [count for count, *_ in pairs], color="C0")
    texts = [f"{letters.name(names, true, 26)} as {letters.name(names, taken, 26)}" for _, true, taken in pairs]
    axes.set_yticks(places, texts, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for place, (count, label, _) in enumerate(pairs):
        axes.text(count, place, f" {count} of {measured[label]}", va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
