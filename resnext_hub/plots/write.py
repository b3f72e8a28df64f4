"""Write all plots of a run.

A plot that fails is logged and skipped: it must not make a finished run fail.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.data.images import IndexedImages
from resnext_hub.errors import one_line
from resnext_hub.plots.confusion import plot_confusion
from resnext_hub.plots.curves import plot_curves
from resnext_hub.plots.lettering import Lettering, choose_lettering
from resnext_hub.plots.per_label import plot_per_label
from resnext_hub.plots.reliability import Confidences, plot_reliability
from resnext_hub.plots.samples import plot_samples
from resnext_hub.plots.theme import LIGHT, Theme
from resnext_hub.record import PLOTS, RunRecord
from resnext_hub.training.evaluation import AnyEvaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_logger = logging.getLogger(__name__)

Draw = Callable[[Lettering], "Figure"]

_FAILURES = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError, ImportError)
"""Errors from matplotlib, its fonts, a full disk, or too little memory."""


def write_plots(record: RunRecord, folder: Path, panels: Sequence[Confidences] = ()) -> list[str]:
    """Write the plots of a model folder; return the names of the written files.

    Args:
        record: The run; the curves are written if it has steps, and the confusion matrix or the results by label.
        folder: Where to write.
        panels: Predictions of which reliability diagrams are written.
    """
    several = record.evaluation.is_multi_label
    draws: list[tuple[bool | int, Draw]] = [
        (record.steps, partial(plot_curves, record)),
        (not several, partial(plot_confusion, record)),
        (several, partial(plot_per_label, record)),
        (len(panels), lambda _: plot_reliability(panels)),
    ]
    return [
        name
        for name, (wanted, draw) in zip(PLOTS, draws, strict=True)
        if wanted and save_plot(folder / name, tuple(record.label_names), draw)
    ]


def write_samples(
    images: IndexedImages,
    evaluation: AnyEvaluation,
    label_names: Sequence[str],
    path: Path,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> bool:
    """Write a gallery of evaluation images; return whether it was written."""
    draw = partial(plot_samples, images, evaluation, label_names, max_pixels=max_pixels)
    return save_plot(path, tuple(label_names), draw)


def save_plot(
    path: Path,
    names: tuple[str, ...],
    draw: Draw,
    theme: Theme = LIGHT,
    dpi: int = 110,
) -> bool:
    """Draw a plot and save it; on failure, log the error, remove the file, and return False.

    Args:
        path: The image file; its folder is created.
        names: Class names, for which fonts are chosen.
        draw: Returns the figure.
        theme: Colors of text and background, and of the series; a color that `draw` chooses is up to it.
        dpi: Pixels per inch.
    """
    try:
        import matplotlib

        letters = choose_lettering(names)
        settings = {"font.family": list(letters.families), **theme.settings()}
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # such as that constrained layout found too little room
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(letters).savefig(path, dpi=dpi, metadata={"Software": None})
    except _FAILURES as error:
        _logger.warning("cannot draw %s: %s", path.name, one_line(error))
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    return True
