"""An optimizer step: forward and backward pass of each micro-batch, gradient clipping, and the update."""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resnext_hub.training.objective import weights_of
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator


def take_step(
    objective: nn.Module,
    optimizer: Any,
    images: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    accelerator: "Accelerator",
) -> torch.Tensor:
    """Take an optimizer step on this process's part of the global batch; return its mean loss and accuracy, `(2,)`."""
    config = plan.config
    optimizer.zero_grad()
    size = len(images)
    total_weight = _weight_per_process(targets, plan, accelerator)
    micro = config.micro_batch_size or size
    total = torch.zeros(2, device=accelerator.device)
    for start in range(0, size, micro):
        part = slice(start, min(start + micro, size))
        last = part.stop == size
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            loss, top1 = objective(images[part], targets[part], total_weight)
            share = (part.stop - start) / size  # by size, because the last micro-batch may be smaller
            loss = loss * share if total_weight is None else loss
            accelerator.backward(loss)
        total += torch.stack((loss.detach(), top1 * share))
    if config.optim.clip_grad is not None:
        accelerator.clip_grad_norm_(objective.parameters(), config.optim.clip_grad)
    optimizer.step()
    return total


def _weight_per_process(targets: torch.Tensor, plan: Plan, accelerator: "Accelerator") -> torch.Tensor | None:
    """Return the total weight of the global batch divided by the number of processes; None without class weights.

    Gradients are averaged over processes, so dividing by this makes the loss a weighted mean over the global batch, for
    any number of processes and micro-batches.
    """
    weights = plan.balance.class_weights
    if weights is None:
        return None
    total = weights_of(targets, torch.tensor(weights, dtype=torch.float32, device=targets.device)).sum()
    mean: torch.Tensor = accelerator.reduce(total, "mean")
    return mean.clamp(min=1e-12)  # a batch of classes with weight 0 has no loss


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed dropout and stochastic depth by the step, so no generator state needs to be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))
