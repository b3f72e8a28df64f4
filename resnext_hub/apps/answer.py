"""Classify one image for a page: classes with their probabilities, whether to trust them, and a heat map."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from resnext_hub.data.decode import UnreadableImageError, decode, within_memory
from resnext_hub.errors import RequestError
from resnext_hub.inference.explain import explain
from resnext_hub.inference.prediction import Unread

if TYPE_CHECKING:
    from PIL.Image import Image

    from resnext_hub.inference.classifier import Classifier

MOST_CLASSES = 5
"""Classes that a page shows of a model with one class per image."""

PRECISION = 0.95
"""Precision of the answers of a page; those that are not probable enough for it are unsure."""

SIDE = 448
"""Largest side of a preview in pixels: twice that on the page, for screens with twice the resolution."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A class with its probability."""

    label: str
    """Name of the class."""
    probability: float
    """From 0 to 1."""
    threshold: float | None = None
    """Probability from which the label is predicted, if an image can have several."""

    @property
    def is_predicted(self) -> bool:
        """Whether the label reaches its threshold; always if it has none."""
        return self.threshold is None or self.probability >= self.threshold


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a page shows about an image."""

    bars: tuple[Bar, ...]
    """The most probable classes in descending order; of a model with several labels per image, all."""
    unsure: bool
    """Whether the most probable class is not probable enough for the precision of a page."""
    unlike: bool
    """Whether the image is unlike the training images."""
    seconds: float
    """Time to decode and classify the image."""
    preview: "Image"
    """The image, upright, at most `SIDE` pixels wide and high."""
    heat_map: "Image | None"
    """The image after resizing and cropping, with the regions that contribute most to the first class; None if there
    is no heat map of this model."""

    @property
    def predicted(self) -> tuple[Bar, ...]:
        """The most probable class, or all labels that reach their thresholds."""
        return tuple(bar for bar in self.bars if bar.is_predicted) if self.is_multi_label else self.bars[:1]

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.bars[0].threshold is not None


def answer(classifier: "Classifier", path: str | os.PathLike[str], *, heat_map: bool) -> Answer:
    """Classify an image file, which is untrusted.

    Args:
        classifier: The classifier.
        path: The file.
        heat_map: Whether to compute a heat map; see `has_heat_maps`.

    Raises:
        UnreadableImageError: If it is not a readable image.
        RunError: If probabilities are not finite.
    """
    start = time.perf_counter()
    with within_memory():
        image = decode({"bytes": None, "path": str(path)}, classifier.input.mode)
        pixels = np.asarray(image)
        # an array has no EXIF orientation that would be applied a second time
        (found,) = classifier.predict(pixels, top=len(classifier.label_names))
        if isinstance(found, Unread):
            raise UnreadableImageError(found.reason)
        seconds = time.perf_counter() - start
        limits = _thresholds(classifier)
        bars = [
            Bar(
                label=guess.label,
                probability=guess.probability,
                threshold=None if limits is None else limits[guess.index],
            )
            for guess in found.guesses
        ]
        return Answer(
            bars=tuple(bars if limits is not None else bars[:MOST_CLASSES]),
            unsure=found.guesses[0].probability < unsure_below(classifier),
            unlike=found.ood_score is not None and found.ood_score > 0,
            seconds=seconds,
            preview=_preview(image),
            heat_map=_heat_map(classifier, pixels, found.guesses[0].index) if heat_map else None,
        )


def unsure_below(classifier: "Classifier") -> float:
    """Return the probability below which an answer is unsure; 0 if that is not known."""
    fitting = [precision for precision in classifier.accept_thresholds if precision >= PRECISION]
    return classifier.accept_thresholds[min(fitting)] if fitting else 0.0


def has_heat_maps(classifier: "Classifier") -> bool:
    """Return whether heat maps of a model can be computed: captum is installed, and the model is convolutional."""
    if find_spec("captum") is None:
        return False
    try:
        explain(classifier, [])
    except RequestError:
        return False
    return True


def _thresholds(classifier: "Classifier") -> Sequence[float] | None:
    """Return the probability from which each label is predicted, or None if an image has exactly one class."""
    return classifier.thresholds


def _preview(image: "Image") -> "Image":
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def _heat_map(classifier: "Classifier", pixels: np.ndarray, label: int) -> "Image":
    from resnext_hub.plots.overlay import draw_overlay

    (found,) = explain(classifier, [pixels], label=label, device=classifier.device)
    if isinstance(found, str):
        raise UnreadableImageError(found)
    return draw_overlay(found.pixels, found.heat)
