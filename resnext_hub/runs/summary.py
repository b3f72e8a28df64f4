"""The plan of a run in words, and warnings about settings and data that are probably not intended."""

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from resnext_hub.data.images import IndexedImages, StreamedImages, count_labels
from resnext_hub.data.splits import Splits
from resnext_hub.processes.launcher import processes
from resnext_hub.runs.estimate import Estimate
from resnext_hub.runs.recipes import AUTO
from resnext_hub.runs.sample import look_at
from resnext_hub.text import listing, printable
from resnext_hub.training.balance import SMALL_CLASS, effective_numbers, is_imbalanced
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)


def describe(plan: Plan, accelerator: "Accelerator", expected: Estimate | None) -> list[str]:
    """Return what a run will do, as lines: model, data, balance, steps, what it will take, and where it goes."""
    config, splits, schedule = plan.config, plan.splits, plan.schedule
    part = config.batch_size // accelerator.num_processes
    images = [f"{_count(splits.train)} training images"]
    images += [f"{_count(found)} {name} images ({_origin(splits, name)})" for name, found in splits.evaluated.items()]
    lines = [
        f"model: {printable(config.model)}, {_weights(plan)}, {plan.input.image_size} px",
        f"{splits.dataset_id}: {', '.join(images)}, {_classes(splits)}",
        *_balance(plan),
        *_finetune(plan),
        *_look(plan),
        f"{schedule.steps} steps of {config.batch_size} images: {accelerator.num_processes} process(es) x {part}, "
        f"{config.images_per_pass(accelerator.num_processes)} per pass; {accelerator.device.type}, "
        f"{ {'no': 'float32'}.get(plan.precision, plan.precision) }, {torch.get_num_threads()} thread(s)",
    ]
    if config.elastic is not None:
        lines.append(f"{config.elastic} virtual processes: the weights do not depend on the number of real processes")
    if expected is not None:
        slower = ", measured without torch.compile" if config.compile else ""
        lines.append(
            f"estimated time: {duration(expected.seconds)} with {len(schedule.evaluations)} evaluations; memory: "
            f"{expected.memory / 1e9:.1f} GB per process{slower}"
        )
    return [*lines, f"run folder: {printable(plan.folder)}"]


def log_plan(plan: Plan, accelerator: "Accelerator", expected: Estimate | None) -> None:
    """Log what a run will do, and warnings about it."""
    for line in describe(plan, accelerator, expected):
        _logger.info("%s", line)
    log_warnings(plan)


def duration(seconds: float) -> str:
    """Return a duration in words: `45 s`, `2.5 min`, `12 min` or `3.5 h`."""
    minutes = seconds / 60
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes:.{int(minutes < 9.95)}f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _classes(splits: Splits) -> str:
    """Describe the classes, and how many labels an image has."""
    classes, train = len(splits.label_names), splits.train
    if isinstance(train, StreamedImages) or not train.is_multi_label:
        return f"{classes} classes"
    return f"{classes} labels, of which a training image has {train.labels.sum(axis=1).mean():.3g} on average"


def _look(plan: Plan) -> list[str]:
    """Return a line about the images of a sample; warn about unreadable ones."""
    seen = look_at(plan.splits, plan.config.loader.max_image_pixels)
    if seen.unreadable:
        _logger.warning(
            "%d of %d sampled images are unreadable: %s; resnext-hub check lists all",
            len(seen.unreadable),
            seen.count,
            listing([f"{name} ({reason})" for name, reason in seen.unreadable.items()], 3),
        )
    if not seen.sizes:
        return []
    shown = [f"{width} x {height}" for width, height in (seen.sizes[0], seen.sizes[-1])]
    pixels = shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"
    return [f"images: {pixels} px, {', '.join(seen.modes)} ({len(seen.sizes)} sampled)"]


def _weights(plan: Plan) -> str:
    if plan.config.finetune.fit_head:
        return "pretrained weights with a new classifier"
    if not plan.source.pretrained:
        return "random weights"
    return f"pretrained weights (classifier: {plan.source.saved.classifier_for(plan.splits.label_names)})"


def _balance(plan: Plan) -> list[str]:
    """Return a line about an imbalance and how the run corrects for it; none for balanced classes."""
    train, config = plan.splits.train, plan.config.balance
    correction = (
        f"class weights {printable(plan.config.balance.class_weights)}"
        if config.class_weights != "none"
        else "balanced sampling"
        if config.sampling == "balanced"
        else f"logit adjustment {config.logit_adjustment:g}"
        if config.logit_adjustment
        else "not corrected (use --sampling balanced or --logit-adjustment 1)"
    )
    if isinstance(train, StreamedImages) or not (is_imbalanced(train) or not correction.startswith("not")):
        return []
    counts = count_labels(train.labels, len(plan.splits.label_names))
    least, most = counts[counts > 0].min(), counts.max()
    few, many = effective_numbers(np.array([least, most]))
    return [
        f"balance: {least} to {most} images per class ({most / least:.0f}:1), effective numbers {few:.0f} to "
        f"{many:.0f}; {correction}"
    ]


def _finetune(plan: Plan) -> list[str]:
    """Return a line about how weights are fine-tuned, such as layers that are kept; none if all train alike."""
    config, schedule, optim = plan.config.finetune, plan.schedule, plan.config.optim
    kept = {
        "none": "",
        "head": "only the classifier is trained",
        "bn": "batch norm layers are frozen",
        "1": "the stem is frozen",
    }
    count, is_auto = plan.splits.train.count, plan.recipe == AUTO
    if config.fit_head and not schedule.steps:
        trained = ["only the classifier is trained, by logistic regression on cached features"]
    else:
        trained = [kept.get(config.freeze, f"the first {config.freeze} stages are frozen")]
        trained += ["classifier fitted first, by logistic regression on cached features"] if config.fit_head else []
    parts = [
        *trained,
        f"only the classifier is trained in the first {schedule.head_steps} steps" if schedule.head_steps else "",
        f"layer decay {config.layer_decay:g}" if config.layer_decay < 1 else "",
        f"learning rate of the classifier {config.head_lr:g}" if config.head_lr is not None else "",
        f"averaged with the initial weights ({config.average_with_start:g})" if config.average_with_start else "",
        f"early stopping after {config.early_stopping} evaluations without improvement"
        if config.early_stopping
        else "",
    ]
    if is_auto and schedule.steps:
        parts.append(f"{optim.optimizer}, learning rate {optim.lr:g}")
    found = ", ".join(filter(None, parts))
    per_class = f" ({count / len(plan.splits.label_names):.0f} training images per class)"
    return [f"recipe auto{per_class}: {found}"] if is_auto else [f"training: {found}"] if found else []


def log_warnings(plan: Plan) -> None:
    """Log warnings about settings and data that are probably not intended."""
    config, splits = plan.config, plan.splits
    count, size, steps = splits.train.count, config.batch_size, plan.schedule.steps
    fitting = _fitting_batch(count, config.epochs)
    if count < size and steps:
        _logger.warning(
            "--batch-size %d is larger than the training split (%d images), so steps repeat images; "
            "--batch-size %d gives %d steps per epoch",
            size,
            count,
            fitting,
            math.ceil(count / fitting),
        )
    elif 0 < steps < 20 and config.max_steps is None:
        _logger.warning(
            "the run has only %d steps; for more, use --batch-size %d or --epochs %g",
            steps,
            fitting,
            config.epochs * 20 / steps,
        )
    if config.tta == "flip" and config.transform.hflip == 0:
        _logger.warning("--tta flip evaluates mirror images, but with --hflip 0 the model is not trained on any")
    policy = config.transform.auto_augment
    if config.transform.color_jitter and policy is not None and "3a" not in policy:
        _logger.warning(
            "--color-jitter %g is ignored, because timm does not combine it with --auto-augment %s",
            config.transform.color_jitter,
            policy,
        )
    _warn_of_lanes(plan)
    for part, images in splits.evaluated.items():
        counts = class_counts(images, len(splits.label_names)) or []
        for few, what in (((0, 0), "no images"), ((1, SMALL_CLASS - 1), f"fewer than {SMALL_CLASS} images")):
            names = [name for name, n in zip(splits.label_names, counts, strict=False) if few[0] <= n <= few[1]]
            if names:
                _logger.warning("classes with %s in the %s split: %s", what, part, listing(names))


def _warn_of_lanes(plan: Plan) -> None:
    """Log a warning if the lanes of a stream do not fit the processes or their workers."""
    lanes, train, size = plan.config.data.lanes, plan.splits.train, plan.config.batch_size
    if lanes is None or not isinstance(train, StreamedImages):
        return
    workers = max(plan.config.loader.workers or 0, 1)
    needed, fitting = workers * processes(), [n for n in range(processes(), size + 1, processes()) if size % n == 0]
    other = next((n for n in fitting if n >= needed), fitting[-1])
    if lanes % processes():
        effect = f"but {processes()} processes cannot share them equally, so some lanes are read by two processes"
    elif lanes < needed:
        effect = f"so only {lanes // processes()} of {workers} workers per process are used"
    else:
        return
    _logger.warning(
        "the stream of %d row groups has %d lanes, %s; a new run with --lanes %d would not have this problem, but "
        "would read up to %.0f %% of the stream twice",
        train.row_groups,
        lanes,
        effect,
        other,
        min(100 * (other - 1) / train.row_groups, 100),
    )


def _fitting_batch(count: int, epochs: float) -> int:
    """Return a batch size, a power of two per process, for at least 4 steps per epoch and 20 per run if possible."""
    images = min(count / 4, count * epochs / 20)
    part = images / processes()
    return processes() * (1 << int(math.log2(part)) if part >= 2 else 2)


def _count(images: IndexedImages | StreamedImages) -> str:
    return f"{images.count} streamed" if isinstance(images, StreamedImages) else str(images.count)


def _origin(splits: Splits, part: str) -> str:
    """Describe where the images of a part of a run come from."""
    stored = splits.stored_in(part)
    if stored is not None:
        return f"split {printable(stored)}"
    if splits.found.folds is not None:
        return f"fold {splits.found.fold or 1} of {splits.found.folds}"
    held_out = [found.count for name, found in splits.evaluated.items() if splits.stored_in(name) is None]
    share = splits.evaluated[part].count / max(splits.train.count + sum(held_out), 1)
    return f"held out, {100 * share:.0f} %"


def class_counts(images: IndexedImages | StreamedImages, classes: int) -> list[int] | None:
    """Return the number of images of each class; None for a stream."""
    if isinstance(images, StreamedImages):
        return None
    return [int(n) for n in count_labels(images.labels, classes)]
