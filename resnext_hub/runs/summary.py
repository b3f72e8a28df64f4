"""What the log says of a run before it starts, with warnings about what is possible but probably not intended."""

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from resnext_hub.data.images import IndexedImages, StreamedImages
from resnext_hub.data.splits import Splits
from resnext_hub.processes.launcher import processes
from resnext_hub.text import listing, printable
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)


def log_plan(plan: Plan, accelerator: "Accelerator") -> None:
    """Log what the run will do."""
    config, splits, schedule = plan.config, plan.splits, plan.schedule
    part = config.batch_size // accelerator.num_processes
    _logger.info("run folder: %s", plan.folder)
    if plan.source.pretrained:
        _logger.info("classifier: %s", plan.source.saved.classifier_for(splits.label_names))
    _logger.info("settings: %s", " ".join(f"{k}={printable(v)}" for k, v in config.to_flat().items() if v is not None))
    _logger.info(
        "%s: %s training images, %s evaluation images (%s), %d classes",
        splits.dataset_id,
        _count(splits.train),
        _count(splits.eval),
        _origin(splits),
        len(splits.label_names),
    )
    _logger.info(
        "%d steps of %d images: %d process(es) x %d, %d at once; %s, %s, %d thread(s)",
        schedule.steps,
        config.batch_size,
        accelerator.num_processes,
        part,
        min(config.micro_batch_size or part, part),
        accelerator.device.type,
        {"no": "float32"}.get(plan.precision, plan.precision),
        torch.get_num_threads(),
    )
    _log_doubts(plan)


def _log_doubts(plan: Plan) -> None:
    config, splits = plan.config, plan.splits
    count, size, steps = splits.train.count, config.batch_size, plan.schedule.steps
    fitting = _fitting_batch(count, config.epochs)
    if count is not None and count < size:
        _logger.warning(
            "--batch-size %d is larger than the training split (%d images), so a step repeats images; "
            "--batch-size %d makes %d steps an epoch",
            size,
            count,
            fitting,
            math.ceil(count / fitting),
        )
    elif steps < 20 and config.max_steps is None:
        _logger.warning(
            "only %d steps: --batch-size %d or --epochs %g makes more", steps, fitting, config.epochs * 20 / steps
        )
    policy = config.transform.auto_augment
    if config.transform.color_jitter and policy is not None and "3a" not in policy:
        _logger.warning(
            "--color-jitter %g is ignored: timm does not combine it with --auto-augment %s",
            config.transform.color_jitter,
            policy,
        )
    if isinstance(splits.eval, IndexedImages):
        counts = class_counts(splits.eval, len(splits.label_names)) or []
        empty = [name for name, count in zip(splits.label_names, counts, strict=True) if count == 0]
        if empty:
            _logger.warning("no evaluation image is of class %s", listing(empty))


def _fitting_batch(count: int | None, epochs: float) -> int:
    """Return a global batch, a power of two per process, with 4 steps an epoch and 20 a run if possible."""
    images = min((count or 1) / 4, (count or 1) * epochs / 20)
    part = images / processes()
    return processes() * (1 << int(math.log2(part)) if part >= 2 else 2)


def _count(images: IndexedImages | StreamedImages) -> str:
    stated = "an unknown number of" if images.count is None else str(images.count)
    return f"{stated} streamed" if isinstance(images, StreamedImages) else stated


def _origin(splits: Splits) -> str:
    """Describe where the evaluation images come from."""
    if splits.found.eval_split is not None:
        return f"split {printable(splits.found.eval_split)}"
    train, held_out = splits.train.count or 0, splits.eval.count or 0
    return f"held out, {100 * held_out / max(train + held_out, 1):.0f} %"


def class_counts(images: IndexedImages | StreamedImages, classes: int) -> list[int] | None:
    """Return the number of images of each class; None for a stream."""
    if isinstance(images, StreamedImages):
        return None
    return [int(n) for n in np.bincount(images.labels, minlength=classes)]
