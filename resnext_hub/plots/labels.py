"""Grid of images whose labels are probably wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.samples import place_image, sheet, thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 6
"""Images per row."""

_CELL = (1.9, 2.3)
"""Width and height of an image with its text, in inches."""

_IMAGE = 1.6
"""Longest side of an image, in inches."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An encoded image, its label, and the class that it probably belongs to."""

    row: dict[str, Any] | None
    name: str
    label: int
    suggested: int
    probability: float


def plot_wrong_labels(
    suspects: Sequence[Suspect],
    label_names: Sequence[str],
    letters: Lettering,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> "Figure":
    """Draw images with their label, the suggested class with its probability, and their name."""
    columns = min(COLUMNS, len(suspects))
    width, height = _CELL[0] * columns, _CELL[1] * -(-len(suspects) // columns)
    figure, axes = sheet(width, height)
    for place, suspect in enumerate(suspects):
        center, top = _CELL[0] * (place % columns + 0.5), _CELL[1] * (place // columns) + 0.1
        place_image(axes, thumbnail(suspect.row, max_pixels), center, top + _IMAGE, _IMAGE)
        label, suggested = (letters.name(label_names, index, 22) for index in (suspect.label, suspect.suggested))
        name = letters.name((suspect.name[-30:],), 0, 30)
        below = top + _IMAGE + 0.05
        for text, size, color in (
            (f"label: {label}", 8, "C3"),
            (f"probably {suggested} ({suspect.probability:.2f})", 8, "black"),
            (name, 6, "gray"),
        ):
            axes.text(center, below, text, fontsize=size, color=color, ha="center", va="top")
            below += 0.15
    return figure
