"""Compute what the files of a run do not contain: logits and embeddings of evaluation images, and a training batch."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from resnext_hub.data.images import IndexedImages
from resnext_hub.data.loaders import derive_workers
from resnext_hub.data.splits import Splits
from resnext_hub.errors import RunError
from resnext_hub.inference.classifier import Classifier
from resnext_hub.models.views import predict_views
from resnext_hub.processes.launcher import local_processes
from resnext_hub.runs.reopen import FinishedRun
from resnext_hub.training.balance import Balance
from resnext_hub.training.feed import StepInputs, evaluation_samples, training_batches
from resnext_hub.training.plan import Plan
from resnext_hub.training.schedule import plan_schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What the model returns for some images of a split."""

    labels: np.ndarray
    """Classes, `(N,)`, or which labels each image has, `(N, classes)` bool."""
    logits: np.ndarray
    """`(N, classes)` float64."""
    embeddings: np.ndarray
    """Inputs of the classifier layer, `(N, features)` float32."""


def compute_outputs(
    run: FinishedRun, classifier: Classifier, images: IndexedImages, most: int, device: torch.device
) -> Outputs:
    """Compute logits and embeddings of up to `most` readable images, evenly spaced in the split.

    Logits are those of the run's evaluation, with its test-time augmentation.

    Args:
        run: The run.
        classifier: Its model.
        images: The split.
        most: Most images.
        device: Device to compute on.

    Raises:
        RunError: If none of them can be read.
    """
    # evenly spaced, because images of a folder are ordered by class
    chosen = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(np.int64))
    some = dataclasses.replace(images, indices=images.indices[chosen], labels=images.labels[chosen])
    samples = evaluation_samples(some, classifier.input, run.config.loader.max_image_pixels)
    model: Any = classifier.model.to(device).to(memory_format=torch.channels_last).eval()
    workers = derive_workers(device.type, local_processes())
    batches = samples.batches(run.record.evaluation.batch_size, 0, 1, workers, pin_memory=False)
    parts: list[tuple[np.ndarray, ...]] = []
    with contextlib.closing(batches), torch.inference_mode():
        for batch in batches:
            if len(batch.unreadable) == len(batch.indices):
                continue
            readable = ~torch.isin(batch.indices, torch.tensor([e.index for e in batch.unreadable], dtype=torch.int64))
            inputs = batch.images[readable].to(device).contiguous(memory_format=torch.channels_last)
            logits = predict_views(model, inputs, classifier.tta).mean(dim=0).double().cpu()
            embedded = model.forward_head(model.forward_features(inputs), pre_logits=True).float().flatten(1).cpu()
            parts.append((batch.labels[readable].numpy(), logits.numpy(), embedded.numpy()))
    if not parts:
        raise RunError("none of the images is readable")
    labels, found, embeddings = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Outputs(labels=labels, logits=found, embeddings=embeddings)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch:
    """The first images of a run's first step, as the model was trained on them."""

    pixels: np.ndarray
    """`(N, H, W, C)` uint8."""
    targets: np.ndarray
    """Share of each class, `(N, classes)`; with several labels per image, which it has."""


def first_batch(run: FinishedRun, classifier: Classifier, splits: Splits, count: int) -> TrainingBatch:
    """Return up to `count` images of the first training step, after augmentation and mixing.

    They are functions of seed, epoch and image, so they are those that the run was trained on.

    Raises:
        RunError: If they cannot be read.
    """
    images, labels = first_inputs(run, classifier, splits, count)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (classifier.input.mean, classifier.input.std))
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)
    targets = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, len(splits.label_names))
    return TrainingBatch(pixels=pixels.permute(0, 2, 3, 1).numpy(), targets=targets.double().numpy())


def first_inputs(
    run: FinishedRun, classifier: Classifier, splits: Splits, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the model got in the first step: images `(N, C, H, W)`, and labels `(N,)` or `(N, classes)`."""
    plan = _plan(run, classifier, splits)
    # a process loads a contiguous part of the batch: the first of several has the first images
    processes = max(plan.config.batch_size // count, 1)
    batches = training_batches(plan, start=0, process=0, processes=processes, pin_memory=False)
    with contextlib.closing(batches):
        batch = next(batches)
    kept = min(len(batch.images), count)
    batch = batch._replace(images=batch.images[:kept], labels=batch.labels[:kept], erased=batch.erased[:kept])
    return StepInputs(plan, device=torch.device("cpu"), process=0)(batch, 0)


def _plan(run: FinishedRun, classifier: Classifier, splits: Splits) -> Plan:
    """Return the plan of a finished run, as far as the inputs of its steps depend on it."""
    config = dataclasses.replace(run.config, loader=dataclasses.replace(run.config.loader, workers=0))
    return Plan(
        config=config,
        source=classifier.source,
        splits=splits,
        input=classifier.input,
        schedule=plan_schedule(config, splits.train.count),
        balance=Balance(),
        precision="no",
        folder=run.folder,
        asked={},
        recipe=None,
        finished=True,
        resume_from=None,
        folder_state=(),
    )
