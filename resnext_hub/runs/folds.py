"""Cross-validation: train a run for each fold, one after another, in folders of one folder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resnext_hub.data.folds import small_classes
from resnext_hub.data.images import IndexedImages, count_labels
from resnext_hub.errors import RequestError, failed_system_call, setting
from resnext_hub.processes.peers import Peers
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.fold_results import CrossValidation, summarize, write_folds
from resnext_hub.runs.request import merge_settings
from resnext_hub.runs.train import TrainRequest, run_plan
from resnext_hub.settings import check_value
from resnext_hub.text import printable
from resnext_hub.training.config import flat_fields
from resnext_hub.training.plan import Plan

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CrossValidated:
    """A finished cross-validation."""

    folder: Path
    """The folder of the folders of the runs."""
    result: CrossValidation
    finished: bool
    """Whether all runs were finished before, so that nothing was computed."""


def requested_folds(request: TrainRequest) -> int | None:
    """Return the number of folds to train one after another, or None for an ordinary run, such as that of one fold.

    Raises:
        RequestError: If the settings are invalid.
    """
    settings, _ = merge_settings(request.asked, request.recipe, request.file)
    if settings.get("folds") is None or settings.get("fold") is not None:
        return None
    folds: int = check_value("folds", settings["folds"], flat_fields()["folds"].type)
    return folds


def train_folds(request: TrainRequest, folds: int, peers: Peers) -> CrossValidated:
    """Train the runs of all folds that are not finished, and summarize them.

    Each is an ordinary run, which resumes where it was stopped.

    Args:
        request: What the user asked for; its output directory is that of all folds.
        folds: Number of folds.
        peers: The processes; their group is closed at the end.

    Raises:
        RequestError: If the request is invalid.
        RunError: If training fails, or the summary cannot be written.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    if request.resume_from is not None:
        raise RequestError(
            f"{setting('folds', folds)} cannot be combined with {setting('resume_from')}; omit one of them"
        )
    settings, _ = merge_settings(request.asked, request.recipe, request.file)
    for name in ("push_to_hub", "push_checkpoints"):
        if settings.get(name):
            raise RequestError(
                f"{setting(name, True)} publishes a single run; omit it, and then push the run of one fold, or train a "
                "model on all images"
            )
    folder = request.output_dir
    if folder is not None:
        peers.from_main(lambda: _require_usable(folder))
    runs: list[tuple[Plan, RunRecord]] = []
    finished = True
    for fold in range(1, folds + 1):
        plan, record = run_plan(_fold_request(request, folds, fold), peers, close=False)
        if fold == 1:
            _warn_of_small_classes(plan, folds)
        _logger.info("fold %d of %d is finished", fold, folds)
        finished = finished and plan.finished
        runs.append((plan, record))
    result = summarize(runs)
    parent = runs[0][0].folder.path.parent
    peers.from_main(lambda: _write(parent, result, runs))
    peers.close()
    return CrossValidated(folder=parent, result=result, finished=finished)


def _fold_request(request: TrainRequest, folds: int, fold: int) -> TrainRequest:
    """Return the request of the run of a fold, which has its own folder."""
    inside = None if request.output_dir is None else request.output_dir / f"fold-{fold}"
    return replace(request, asked={**request.asked, "folds": folds, "fold": fold}, output_dir=inside)


def _require_usable(folder: Path) -> None:
    """Raise RequestError if the folder contains a run of its own."""
    if RunFolder(folder).is_run:
        raise RequestError(
            f"{printable(folder)} contains a run; choose another {setting('output_dir')} for the fold folders"
        )


def _warn_of_small_classes(plan: Plan, folds: int) -> None:
    splits, counts = plan.splits, np.zeros(len(plan.splits.label_names), dtype=np.int64)
    for images in (splits.train, splits.eval):
        assert isinstance(images, IndexedImages)  # streams have no folds
        counts += count_labels(images.labels, len(counts))
    warning = small_classes(splits.label_names, counts.tolist(), folds)
    if warning is not None:
        _logger.warning("%s: %s", splits.dataset_id, warning)


def _write(folder: Path, result: CrossValidation, runs: Sequence[tuple[Plan, RunRecord]]) -> None:
    try:
        write_folds(folder, result, runs)
    except OSError as error:
        raise failed_system_call(error) from error
