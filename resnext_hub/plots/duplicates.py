"""Grid of images with the same content, a group per row."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.samples import place_image, sheet, thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4
"""Images of a group that are shown."""

_CELL = (2.2, 2.3)
"""Width and height of an image with its text, in inches."""

_IMAGE = 1.6
"""Longest side of an image, in inches."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An encoded image, and the text below it."""

    row: dict[str, Any]
    name: str
    label: str


def plot_groups(groups: Sequence[Sequence[Tile]], letters: Lettering) -> "Figure":
    """Draw groups of images, one per row, with the name and the label of each image."""
    columns = min(COLUMNS, max(map(len, groups)))
    width, height = _CELL[0] * columns, _CELL[1] * len(groups)
    figure, axes = sheet(width, height)
    for line, group in enumerate(groups):
        for place, tile in enumerate(group[:COLUMNS]):
            center, top = _CELL[0] * (place + 0.5), _CELL[1] * line + 0.1
            place_image(axes, thumbnail(tile.row, MAX_IMAGE_PIXELS), center, top + _IMAGE, _IMAGE)
            name = textwrap.shorten(tile.name, 60, placeholder="…") if " " in tile.name else tile.name[-30:]
            text = f"{letters.name((tile.label,), 0, 24)}\n{textwrap.fill(letters.name((name,), 0, 60), 30)}"
            axes.text(center, top + _IMAGE + 0.05, text, fontsize=7, ha="center", va="top")
    return figure
