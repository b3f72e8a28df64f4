"""Evaluate the model folder of a finished run again."""

from pathlib import Path

import numpy as np
import torch

from resnext_hub.errors import RequestError
from resnext_hub.facts import EvaluationFacts
from resnext_hub.inference.classifier import load
from resnext_hub.machine import device_type
from resnext_hub.processes.accelerator import set_threads
from resnext_hub.record import RunRecord
from resnext_hub.runs.reopen import reopen
from resnext_hub.text import printable
from resnext_hub.training.evaluation import AnyEvaluation, evaluate
from resnext_hub.training.feed import evaluation_samples
from resnext_hub.training.multi_label import MultiLabelEvaluation


def evaluate_run(
    path: Path, threads: str = "auto", only: str | None = None
) -> tuple[dict[str, AnyEvaluation], RunRecord]:
    """Evaluate the model folder of a finished run as the run itself did, on its evaluation and its test split.

    Args:
        path: The run folder.
        threads: CPU threads, or `auto`.
        only: The split to evaluate on, `evaluation` or `test`; all if not given.

    Returns:
        The evaluations by split, `evaluation` and `test` if there is one, and the record of the run to compare them
        with.

    Raises:
        RequestError: If the folder holds no finished run, or its dataset is missing or has changed.
    """
    run = reopen(path)
    if only == "test" and run.record.test is None:
        raise RequestError(f"the run in {printable(run.folder)} had no test split; choose split='evaluation'")
    splits = run.load_splits()
    device = torch.device(device_type())
    set_threads(threads, device.type)
    classifier = load(f"local-dir:{run.folder.model}")
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    evaluations = {
        part: evaluate(
            model,
            evaluation_samples(images, classifier.input, run.config.loader.max_image_pixels),
            batch_size=run.record.evaluation.batch_size,
            device=device,
            thresholds=None if classifier.thresholds is None else np.array(classifier.thresholds),
            tta=classifier.tta,
        )
        for part, images in splits.evaluated.items()
        if only in (None, part)
    }
    return evaluations, run.record


def same_counts(evaluation: AnyEvaluation, recorded: EvaluationFacts) -> bool:
    """Return whether an evaluation has the counts of every class that are recorded."""
    if not isinstance(evaluation, MultiLabelEvaluation):
        return evaluation.confusion(len(recorded.confusion)) == recorded.confusion
    columns = (evaluation.positives, evaluation.predicted, evaluation.true_positives)
    counts = list(zip(*(column.tolist() for column in columns), strict=True))
    labels = recorded.labels or []
    stated = [(label.positives, label.predicted, label.true_positives) for label in labels]
    return counts == stated and evaluation.correct == recorded.correct
