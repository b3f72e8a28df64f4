"""Compute the features of many images, the inputs of the classifier layer, with all processes of a run."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resnext_hub.data.images import IndexedImages
from resnext_hub.kernels.training_view import build_training_view
from resnext_hub.training.feed import evaluation_samples
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """What a model computes for images."""

    values: np.ndarray
    """Features of each view, `(views, N, features)` float32."""
    logits: np.ndarray | None
    """Logits of the first view, `(N, classes)` float32, if they were asked for."""
    read: np.ndarray
    """Which images are readable, `(N,)` bool."""


def sampled(count: int, most: int, seed: int) -> np.ndarray:
    """Return the rows of up to `most` of a number of images, in ascending order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def select(images: IndexedImages, rows: np.ndarray) -> IndexedImages:
    """Return some of the images."""
    return IndexedImages(images.rows, images.image_column, images.indices[rows], images.labels[rows], images.roots)


@torch.no_grad()
def compute_features(
    plan: Plan,
    images: IndexedImages,
    model: nn.Module,
    accelerator: "Accelerator",
    *,
    mirrored: bool = False,
    logits: bool = False,
) -> Features:
    """Compute the features of images as in evaluation; each process computes a part of them.

    Args:
        plan: The run.
        images: The images.
        model: The model; its mode is not changed.
        accelerator: The accelerator of this process.
        mirrored: Whether the mirror image of each image is a second view.
        logits: Whether to return the logits as well.
    """
    config, device = plan.config, accelerator.device
    # faster than the model on a CPU; the features differ only by rounding
    view: Any = build_training_view(model.to(device).to(memory_format=torch.channels_last), {}).eval()
    samples = evaluation_samples(images, plan.input, config.loader.max_image_pixels)
    batches: Any = samples.batches(
        config.eval_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        config.loader.workers or 0,
        device.type == "cuda",
    )
    views = 2 if mirrored else 1
    read = torch.zeros(len(images), dtype=torch.float64)
    found = torch.zeros(views, len(images), view.num_features)
    answers = torch.zeros(len(images), view.num_classes if logits else 0)
    with contextlib.closing(batches):
        for batch in batches:
            inputs = batch.images.to(device).contiguous(memory_format=torch.channels_last)
            for number in range(views):
                maps = view.forward_features(inputs.flip(3) if number else inputs)
                values = view.forward_head(maps, pre_logits=True).float().flatten(1).cpu()
                if values.shape[1] != found.shape[2]:  # some models end in a layer that is wider than their features
                    found = torch.zeros(views, len(images), values.shape[1])
                found[number, batch.indices] = values
                if logits and number == 0:
                    answers[batch.indices] = view.forward_head(maps).float().cpu()
            read[batch.indices] = 1.0
            read[[entry.index for entry in batch.unreadable]] = 0.0
    if accelerator.num_processes > 1:
        summed: Any = accelerator.reduce([part.to(device) for part in (read, found, answers)], "sum")
        read, found, answers = (value.cpu() for value in summed)
    return Features(values=found.numpy(), logits=answers.numpy() if logits else None, read=read.numpy().astype(bool))
