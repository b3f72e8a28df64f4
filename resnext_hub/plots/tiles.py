"""Sheets of images with a text below each: a training batch, or images with their heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resnext_hub.plots.samples import place_image, sheet
from resnext_hub.plots.theme import LIGHT, PAGE_WIDTH, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLUMNS = 4
"""Images in a row."""

_LINE = 0.16
"""Height of a line of text, in inches."""

_GAP = 0.1
"""Space between images, in inches."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Images side by side, with text below them."""

    images: tuple["Image", ...]
    text: str
    """As matplotlib draws it, with line breaks."""


def plot_tiles(tiles: Sequence[Tile], theme: Theme = LIGHT) -> "Figure":
    """Draw tiles with equally many images each, in rows of `COLUMNS` images."""
    from matplotlib.patches import Rectangle

    per_tile = max(len(tile.images) for tile in tiles)
    columns, cell = COLUMNS // per_tile, PAGE_WIDTH / COLUMNS
    side, lines = cell - _GAP, max(tile.text.count("\n") + 1 for tile in tiles)
    height = side + lines * _LINE + 2 * _GAP
    figure, axes = sheet(PAGE_WIDTH, height * -(-len(tiles) // columns))
    for place, tile in enumerate(tiles):
        left, top = cell * per_tile * (place % columns), height * (place // columns) + _GAP / 2
        for number, image in enumerate(tile.images):
            place_image(axes, image, left + cell * (number + 0.5), top + side, side)
            x0, x1, y0, y1 = axes.images[-1].get_extent()  # framed: an image may have the color of the page
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=theme.faint, linewidth=0.4))
        middle = left + cell * per_tile / 2
        axes.text(middle, top + side + 0.04, tile.text, fontsize=8, color=theme.ink, ha="center", va="top")
    return figure
