"""Evaluate the model folder of a finished run again."""

from pathlib import Path

import torch

from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import load
from resnext_hub.machine import device_type
from resnext_hub.processes.accelerator import set_threads
from resnext_hub.record import RunRecord
from resnext_hub.runs.reopen import reopen
from resnext_hub.text import printable
from resnext_hub.training.evaluation import Evaluation, evaluate
from resnext_hub.training.feed import evaluation_samples


def evaluate_run(path: Path, threads: str = "auto", only: str | None = None) -> tuple[dict[str, Evaluation], RunRecord]:
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
        )
        for part, images in splits.evaluated.items()
        if only in (None, part)
    }
    return evaluations, run.record
