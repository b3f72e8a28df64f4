"""Gallery of evaluation images with true and predicted classes."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, decode
from resnext_hub.data.images import IndexedImages
from resnext_hub.plots.lettering import Lettering
from resnext_hub.training.evaluation import AnyEvaluation
from resnext_hub.training.multi_label import MultiLabelEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

THUMBNAIL = 256
"""Longest side of an image in the gallery, in pixels."""

COLUMNS = 6
"""Images per row of the gallery."""

CELL = (1.9, 2.2)
"""Width and height of an image with its text, in inches."""

IMAGE = 1.6
"""Longest side of an image, in inches."""

CAPTION = 0.6
"""Height of the caption, in inches."""


def plot_samples(
    images: IndexedImages,
    evaluation: AnyEvaluation,
    label_names: Sequence[str],
    letters: Lettering,
    max_pixels: int = MAX_IMAGE_PIXELS,
    count: int = 24,
) -> "Figure":
    """Draw up to `count` evaluation images with true and predicted class or labels, the worst mistakes first."""
    several = isinstance(evaluation, MultiLabelEvaluation)
    wrong = evaluation.labels != evaluation.predictions
    wrong = wrong.any(axis=1) if several else wrong
    shown = _chosen(evaluation, wrong, count)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width, height = CELL[0] * columns, CELL[1] * rows + CAPTION
    figure, axes = sheet(width, height)
    for place, entry in enumerate(shown):
        image = thumbnail(images.row(int(evaluation.indices[entry])), max_pixels)
        center, bottom = CELL[0] * (place % columns + 0.5), CELL[1] * (place // columns + 1)
        place_image(axes, image, center, bottom, IMAGE)
        label, prediction = (
            _names(found[entry], label_names, letters) for found in (evaluation.labels, evaluation.predictions)
        )
        text = f"{label}\nas {prediction}" if wrong[entry] else label
        if not several:
            text += f"\n{percent(float(evaluation.probabilities[entry]))}"
        color = "C3" if wrong[entry] else "black"
        axes.text(center, bottom - IMAGE - 0.05, text, fontsize=8, color=color, ha="center", va="bottom")
    what = "labels" if several else "class"
    caption = f"red: true {what}, then predicted {what}; black: correct" if wrong.any() else "all correct"
    caption += "" if several else "; percentage: probability of the prediction"
    caption = textwrap.fill(caption + letters.note(label_names), 24 * columns)
    axes.text(width / 2, height - CAPTION / 2, caption, fontsize=8, ha="center", va="center")
    return figure


def _names(found: Any, label_names: Sequence[str], letters: Lettering) -> str:
    """Return the name of a class by its index, or those of several labels, which are true, in at most two lines."""
    if np.ndim(found) == 0:
        return letters.name(label_names, int(found), 22)
    names = [letters.name(label_names, int(index), 22) for index in np.flatnonzero(found)]
    return "\n".join(textwrap.wrap(", ".join(names) or "none", 24, max_lines=2, placeholder=" …"))


def _chosen(evaluation: AnyEvaluation, wrong: np.ndarray, count: int) -> list[int]:
    """Return entries to show: mistakes for up to half, the worst first, then correct ones spread evenly."""
    worst = evaluation.losses if isinstance(evaluation, MultiLabelEvaluation) else evaluation.probabilities
    order = np.lexsort((-worst, ~wrong))
    mistakes = order[: min(count // 2, int(wrong.sum()))]
    correct = np.flatnonzero(~wrong)
    spread = correct[np.linspace(0, len(correct) - 1, min(count - len(mistakes), len(correct))).astype(np.int64)]
    return [int(entry) for entry in (*mistakes, *spread)]


def thumbnail(row: dict[str, Any] | None, max_pixels: int) -> "Image.Image":
    """Return a stored image shrunk at once, so that the gallery holds one full-size image at a time."""
    from PIL import Image

    try:
        image = decode(row, "RGB", max_pixels)
    except UnreadableImageError:  # readable during evaluation, but changed or removed since
        return Image.new("RGB", (8, 8), "white")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def sheet(width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure and axes that fill it, whose unit is an inch and whose y axis points down."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.axis("off")
    return figure, axes


def place_image(axes: "Axes", image: "Image.Image", center: float, bottom: float, side: float) -> None:
    """Draw an image in the middle of a square, in axes whose unit is an inch and whose y axis points down.

    Args:
        axes: The axes.
        image: The image; its longest side becomes that of the square.
        center: Horizontal center of the square.
        bottom: Lower edge of the square.
        side: Side of the square.
    """
    scale = side / max(image.size)
    half, high = image.width * scale / 2, image.height * scale
    below = (side - high) / 2
    extent = (center - half, center + half, bottom - below, bottom - below - high)
    axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest")


def percent(part: float) -> str:
    """Return a fraction as a whole percentage that is 0 % or 100 % only if exact."""
    if 0.0 < part < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < part < 1.0 else f"{100 * part:.0f} %"
