"""The parts of a report that show images: a training batch, mistakes and close calls."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.data.images import IndexedImages
from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import Classifier
from resnext_hub.inference.explain import explain
from resnext_hub.inference.inputs import ImageInput, prepare
from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.overlay import draw_overlay
from resnext_hub.plots.samples import percent
from resnext_hub.plots.theme import Theme
from resnext_hub.plots.tiles import Tile, plot_tiles
from resnext_hub.report.outputs import TrainingBatch
from resnext_hub.report.sections import Plot, Section, not_shown
from resnext_hub.report.stored import Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 16
"""Images of a training batch that are shown."""

SHOWN = 8
"""Mistakes, and right predictions, that are shown."""

_NAME = 22
"""Characters of a class name below an image."""


def training_batch(batch: TrainingBatch, names: Sequence[str], mixes: bool) -> Section:
    """Return the section on what the model was trained on."""
    count = len(batch.pixels)
    images = [_image(pixels) for pixels in batch.pixels]

    def draw(letters: Lettering, theme: Theme) -> "Figure":
        texts = [_shares(row, names, letters) for row in batch.targets]
        return plot_tiles([Tile(images=(i,), text=t) for i, t in zip(images, texts, strict=True)], theme)

    what = "augmentation and mixing" if mixes else "augmentation"
    text = (
        f"The first {count} images of the first step after {what}, exactly as in training: the seed, the epoch and the "
        "image determine every pixel."
    )
    alt = f"{count} training images after {what}, with their labels."
    return Section(title="A training batch", text=text, plots=(Plot(name="batch", alt=alt, draw=draw),))


def _shares(shares: np.ndarray, names: Sequence[str], letters: Lettering) -> str:
    """Return the labels of a training image, with their shares if it is mixed from two."""
    order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
    whole = all(shares[i] == 1 for i in order)
    lines = [letters.name(names, i, _NAME) + ("" if whole else f" {100 * shares[i]:.0f} %") for i in order[:4]]
    more = [f"and {len(order) - 4} more"] if len(order) > 4 else []
    return "\n".join([*lines, *more]) or "no label"


def mistakes_and_hits(
    stored: Predictions,
    images: IndexedImages,
    classifier: Classifier,
    device: torch.device,
    max_pixels: int,
) -> tuple[Section, Section]:
    """Return the sections on the most confident mistakes and the least confident correct predictions.

    Args:
        stored: Predictions of the split.
        images: The split.
        classifier: The model of the run.
        device: Device to compute on.
        max_pixels: An image with more pixels is unreadable.
    """
    best = "its most probable label" if stored.several else "the predicted class"
    shown = f"The heat map beside each image marks the regions that contribute most to {best} (Grad-CAM)."
    make = partial(_gallery, stored=stored, images=images, classifier=classifier, device=device, max_pixels=max_pixels)
    wrong = int(stored.wrong.sum())
    mistakes = make(
        stored.confident_mistakes[:SHOWN],
        name="mistakes",
        title="Most confident mistakes",
        text=f"The most confident of the {wrong:,} wrong predictions. {shown}",
        empty="there are no mistakes",
    )
    hits = make(
        stored.doubtful_hits[:SHOWN],
        name="hits",
        title="Least confident correct predictions",
        text=f"The least confident of the {len(stored.wrong) - wrong:,} correct predictions. {shown}",
        empty="no prediction is correct",
    )
    return mistakes, hits


def _gallery(
    places: np.ndarray,
    *,
    name: str,
    title: str,
    text: str,
    empty: str,
    stored: Predictions,
    images: IndexedImages,
    classifier: Classifier,
    device: torch.device,
    max_pixels: int,
) -> Section:
    if not len(places):
        return not_shown(title, "Images are", empty)
    inputs = [_encoded(images, int(stored.indices[place])) for place in places]
    tiles, reason = _explained(classifier, inputs, device, max_pixels)

    def draw(letters: Lettering, theme: Theme) -> "Figure":
        texts = [_caption(stored, int(place), classifier.label_names, letters) for place in places]
        return plot_tiles([Tile(images=i, text=t) for i, t in zip(tiles, texts, strict=True)], theme)

    beside = "" if reason else ", each beside its heat map"
    plot = Plot(name=name, alt=f"{len(places)} images: {title.lower()}{beside}.", draw=draw)
    missing = (f"Heat maps are not shown: {reason}.",) if reason else ()
    return Section(
        title=title, text=text.partition(" The heat map")[0] if reason else text, plots=(plot,), missing=missing
    )


def _explained(
    classifier: Classifier, inputs: Sequence[ImageInput], device: torch.device, max_pixels: int
) -> tuple[list[tuple[Image.Image, ...]], str]:
    """Return images as the model sees them, with their overlays, or else the reason why there are none."""
    try:
        found = list(explain(classifier, inputs, batch_size=len(inputs), device=device, max_pixels=max_pixels))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        reason = f'{package} is not installed; pip install "resnext-hub[report]"'
    except RequestError as error:
        reason = str(error)
    else:
        blank = (Image.new("RGB", (8, 8), "white"),) * 2  # readable during the run, but not any more
        return [blank if isinstance(e, str) else (_image(e.pixels), draw_overlay(e.pixels, e.heat)) for e in found], ""
    return [(_as_seen(classifier, entry),) for entry in inputs], reason


def _as_seen(classifier: Classifier, image: ImageInput) -> Image.Image:
    try:
        pixels = prepare(classifier, [image])[0]
    except RequestError:
        return Image.new("RGB", (8, 8), "white")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (classifier.input.mean, classifier.input.std))
    return _image((255 * (pixels * std + mean)).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _encoded(images: IndexedImages, index: int) -> ImageInput:
    try:
        row: dict[str, Any] = images.row(index)
    except UnreadableImageError:
        return b""
    found: ImageInput = row["path"] if row["bytes"] is None else row["bytes"]
    return found or b""


def _image(pixels: np.ndarray) -> Image.Image:
    """Return `(H, W, C)` uint8 as an image in RGB."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def _caption(stored: Predictions, place: int, names: Sequence[str], letters: Lettering) -> str:
    label, prediction = stored.labels[place], stored.predictions[place]
    if stored.several:
        lines = [f"true: {_set(label, names, letters)}"]
        return "\n".join([*lines, f"predicted: {_set(prediction, names, letters)}"] if stored.wrong[place] else lines)
    certain = f"{letters.name(names, int(prediction), _NAME)}, {percent(float(stored.probabilities[place]))}"
    if not stored.wrong[place]:
        return certain
    return f"true: {letters.name(names, int(label), _NAME)}\npredicted: {certain}"


def _set(own: np.ndarray, names: Sequence[str], letters: Lettering) -> str:
    listed = [letters.name(names, int(i), 12) for i in np.flatnonzero(own)]
    return (", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "no label"
