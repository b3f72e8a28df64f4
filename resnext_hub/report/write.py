"""Write the report of a finished run, from its files and its dataset."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import Splits
from resnext_hub.errors import RequestError, RunError
from resnext_hub.files import new_folder, write_atomic
from resnext_hub.inference.classifier import Classifier, load
from resnext_hub.machine import device_type
from resnext_hub.plots.lettering import Lettering
from resnext_hub.plots.theme import THEMES, Theme
from resnext_hub.plots.write import save_plot
from resnext_hub.processes.accelerator import set_threads
from resnext_hub.report import sections
from resnext_hub.report.galleries import BATCH, mistakes_and_hits, training_batch
from resnext_hub.report.outputs import Outputs, compute_outputs, first_batch
from resnext_hub.report.page import PAGE, Figure, render_page
from resnext_hub.report.sections import Plot, Section, not_shown
from resnext_hub.report.stored import Predictions, read_predictions
from resnext_hub.runs.reopen import FinishedRun, reopen
from resnext_hub.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

_logger = logging.getLogger(__name__)

IMAGES = 2000
"""Images that are read again, if not stated."""

DPI = 190
"""Resolution of the plots: two pixels for each that a page of 600 pixels has."""


def write_report(path: Path, *, images: int = IMAGES, threads: str = "auto") -> Path:
    """Write the plots and the page of a finished run; return the page.

    Args:
        path: The run folder.
        images: Most images of the split whose logits and embeddings are computed again.
        threads: CPU threads, or `auto`.

    Raises:
        RequestError: If the folder holds no finished run.
    """
    run = reopen(path)
    device = torch.device(device_type())
    set_threads(threads, device.type)
    classifier = load(f"local-dir:{run.folder.model}")
    parts = list(_sections(run, classifier, images, device))
    names = tuple(run.record.label_names)
    folder = run.folder.report
    folder.parent.mkdir(exist_ok=True)
    with new_folder(folder) as aside:
        figures = {plot.name: figure for part in parts for plot in part.plots if (figure := _draw(plot, names, aside))}
        write_atomic(aside / PAGE, render_page(run.record, parts, figures))
    return folder / PAGE


def _draw(plot: Plot, names: tuple[str, ...], folder: Path) -> Figure | None:
    """Write a plot in both themes; return its files, or None if it cannot be drawn."""
    content = {}
    for theme in THEMES:
        file = folder / f"{plot.name}-{theme.name}.png"
        if not save_plot(file, names, partial(_with_theme, plot, theme), theme, DPI):
            return None
        content[theme.name] = file.read_bytes()
    return Figure(**content)


def _with_theme(plot: Plot, theme: Theme, letters: Lettering) -> "MatplotlibFigure":
    return plot.draw(letters, theme)


def _sections(run: FinishedRun, classifier: Classifier, most: int, device: torch.device) -> Iterator[Section]:
    record = run.record
    splits, stored = _open(run), _stored(run)
    images = splits if isinstance(splits, str) else splits.eval if record.test is None else splits.test
    outputs: Outputs | str
    if isinstance(images, str):
        outputs = images
    else:
        assert isinstance(images, IndexedImages)
        outputs = _outputs(run, classifier, images, most, device)
    yield sections.curves(record)
    yield _batch(run, classifier, splits)
    yield sections.confusion(record)
    yield sections.classes(record)
    if isinstance(stored, str) or isinstance(images, str):
        yield not_shown(
            "Mistakes and correct predictions", "Images are", stored if isinstance(stored, str) else str(images)
        )
    else:
        yield from mistakes_and_hits(stored, images, classifier, device, run.config.loader.max_image_pixels)
    yield sections.reliability(record, stored, outputs)
    yield sections.embeddings(record, outputs)


def _open(run: FinishedRun) -> Splits | str:
    """Open the dataset of a run; return why it cannot be read instead of raising an error."""
    reason = "the dataset was streamed, so images cannot be looked up by index"
    if not run.config.data.streaming:
        try:
            return run.load_splits()
        except (RequestError, RunError) as error:
            reason = error.for_command_line()
    _logger.warning("%s: the report has no images: %s", printable(run.folder), reason)
    return reason.replace(printable(run.config.data.dataset), printable(run.record.dataset.id))  # a page may be shared


def _outputs(
    run: FinishedRun, classifier: Classifier, images: IndexedImages, most: int, device: torch.device
) -> Outputs | str:
    _logger.info("computing logits and embeddings of %d images", min(most, len(images)))
    try:
        return compute_outputs(run, classifier, images, most, device)
    except (RequestError, RunError) as error:
        return str(error)


def _stored(run: FinishedRun) -> Predictions | str:
    """Read the predictions of the split that the record reports; return why they cannot be read otherwise."""
    record = run.record
    path = run.folder.predictions if record.test is None else run.folder.test_predictions
    count = record.dataset.eval_count if record.test is None else record.dataset.test_count
    try:
        return read_predictions(path, len(record.label_names), record.reported.is_multi_label, count)
    except RequestError as error:
        return str(error)


def _batch(run: FinishedRun, classifier: Classifier, splits: Splits | str) -> Section:
    if isinstance(splits, str):
        return not_shown("A training batch", "Images are", splits)
    if not run.record.steps:
        reason = "only the classifier was fitted, so there were no training steps"
        return not_shown("A training batch", "Images are", reason)
    try:
        batch = first_batch(run, classifier, splits, BATCH)
    except (RequestError, RunError) as error:
        return not_shown("A training batch", "Images are", str(error))
    return training_batch(batch, splits.label_names, run.config.transform.mixes)
