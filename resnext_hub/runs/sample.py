"""A quick look at some images of each split before a run; `resnext-hub check` examines all of them."""

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from resnext_hub.data.decode import UnreadableImageError, decode, opened, read_bytes
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import Images, Splits

MOST = 100
"""Most images of a split that are looked at."""

_SECONDS = 1.0
"""Time after which looking at a split ends."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What the images of a sample have in common, and which are unreadable."""

    count: int
    sizes: tuple[tuple[int, int], ...]
    """Widths and heights in pixels, by number of pixels."""
    modes: tuple[str, ...]
    """Modes in Pillow's terms, the most frequent first."""
    unreadable: dict[str, str]
    """Names of unreadable images by part and name, and why."""


def look_at(splits: Splits, most_pixels: int) -> Sampled:
    """Decode evenly spaced images of each split; a stream is left out, since that would download it.

    Args:
        splits: The splits of a run.
        most_pixels: Number of pixels above which an image is unreadable.
    """
    sizes, modes, unreadable, count = [], Counter[str](), {}, 0
    parts: dict[str, Images] = {"training": splits.train, **splits.evaluated}
    for part, images in parts.items():
        if not isinstance(images, IndexedImages):
            continue
        begin = time.monotonic()
        for index in np.unique(np.linspace(0, len(images) - 1, min(MOST, len(images))).round().astype(int)).tolist():
            count += 1
            try:
                row = images.row(index)
                with opened(read_bytes(row, most_pixels)) as image:
                    sizes.append(image.size)
                    modes[image.mode] += 1
                decode(row, "RGB", most_pixels)
            except UnreadableImageError as error:
                unreadable[f"{part}: {images.name(index)}"] = str(error)
            if time.monotonic() - begin > _SECONDS:
                break
    return Sampled(
        count=count,
        sizes=tuple(sorted(sizes, key=lambda size: (size[0] * size[1], size))),
        modes=tuple(mode for mode, _ in modes.most_common()),
        unreadable=unreadable,
    )
