"""An image with a heat map on it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 224
"""Smallest height and width of an overlay; smaller images are enlarged by a whole number."""

STRENGTH = 0.6
"""Opacity of the hottest part; cold parts are transparent."""

HOTTEST = 0.92
"""Place of the hottest part in the colormap; its end is so dark that it would look cold on a dark image."""

NAME = 100
"""Longest name of an overlay, in characters, before its suffix."""


def draw_overlay(pixels: np.ndarray, heat: np.ndarray) -> "Image":
    """Return an image with a heat map on it, in RGB.

    Args:
        pixels: The image, `(H, W, C)` uint8 with one or three channels.
        heat: The heat map, `(H, W)`, 0 to 1.
    """
    import matplotlib
    from PIL import Image

    colors = np.asarray(matplotlib.colormaps["turbo"](HOTTEST * heat))[:, :, :3]
    opacity = STRENGTH * heat[:, :, None]
    mixed = (1 - opacity) * pixels / 255 + opacity * colors
    image = Image.fromarray((255 * mixed).round().astype(np.uint8))
    factor = max(-(-SIDE // min(image.size)), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def overlay_names(images: Iterable[object]) -> Iterator[str]:
    """Yield a file name for the overlay of each image, by its path; all of them are different.

    A name is that of the image and of the folder that it is in; images of the same name are numbered.
    """
    taken: set[str] = set()
    for path in (Path(str(image)) for image in images):
        parts = (path.parent.name, path.stem) if path.parent.name not in ("", "..") else (path.stem,)
        stem = printable("-".join(parts)).replace("\\", "_")[-NAME:]
        name, number = f"{stem}-heatmap.png", 1
        while name.casefold() in taken:  # some file systems ignore case
            number += 1
            name = f"{stem}-heatmap-{number}.png"
        taken.add(name.casefold())
        yield name
