"""Evaluate the model folder of a finished run again."""

from pathlib import Path

import torch

from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError
from resnext_hub.hub.publish import require_config
from resnext_hub.inference.classifier import load
from resnext_hub.machine import device_type
from resnext_hub.processes.accelerator import set_threads
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.existing import read_config
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig
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
    folder = RunFolder(path)
    record = RunRecord.load(folder.record)
    settings = read_config(folder)
    if not settings:
        raise RequestError(
            f"{printable(folder)} has no config.yaml, so the dataset to evaluate on is unknown; restore the file"
        )
    require_config(folder.model, record)
    config = TrainConfig.from_flat(settings)
    if only == "test" and record.test is None:
        raise RequestError(f"the run in {printable(folder)} had no test split; choose split='evaluation'")
    splits = load_splits(config.data)
    if splits.fingerprint != record.dataset.fingerprint:
        raise RequestError(
            f"{printable(config.data.dataset)} has changed since the run: its fingerprint is "
            f"{splits.fingerprint[:16]}, expected {record.dataset.fingerprint[:16]}"
        )
    device = torch.device(device_type())
    set_threads(threads, device.type)
    classifier = load(f"local-dir:{folder.model}")
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    evaluations = {
        part: evaluate(
            model,
            evaluation_samples(images, classifier.input, config.loader.max_image_pixels),
            batch_size=record.evaluation.batch_size,
            device=device,
        )
        for part, images in splits.evaluated.items()
        if only in (None, part)
    }
    return evaluations, record
