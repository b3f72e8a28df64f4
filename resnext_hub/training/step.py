"""An optimizer step: forward and backward pass of each micro-batch, gradient clipping, and the update.

With `--elastic`, the global batch is divided among virtual processes instead of real ones. What a virtual process
computes is a function of the weights, the step and its index, and the results are added in one order, so the step is
the same to the bit for any number of real processes.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from resnext_hub.machine import cores
from resnext_hub.processes.launcher import local_processes
from resnext_hub.processes.tree import Summands, Tree
from resnext_hub.training.objective import weights_of
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare_objective(objective: nn.Module, plan: Plan, accelerator: "Accelerator") -> nn.Module:
    """Return an objective with mixed precision and, unless virtual processes add up their gradients, DDP.

    The model is on its device already; if Accelerate moved it again, its buffers would be replaced by copies.
    """
    virtual = plan.config.elastic is not None
    prepared: nn.Module = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=virtual)
    return prepared


def take_step(
    objective: nn.Module,
    optimizer: Any,
    images: torch.Tensor,
    targets: torch.Tensor,
    step: int,
    plan: Plan,
    accelerator: "Accelerator",
) -> torch.Tensor:
    """Take an optimizer step; return the mean loss and accuracy of what this process computed, `(2,)`.

    Args:
        objective: The objective, see `prepare_objective`.
        optimizer: The optimizer.
        images: Images of this process's part of the global batch, `(N, C, H, W)`.
        targets: Their labels or targets.
        step: The step, from 0.
        plan: The run.
        accelerator: The accelerator of this process.
    """
    optimizer.zero_grad()
    compute = _compute if plan.config.elastic is None else _compute_virtual
    metrics = compute(objective, images, targets, step, plan, accelerator)
    if plan.config.optim.clip_grad is not None:
        accelerator.clip_grad_norm_(objective.parameters(), plan.config.optim.clip_grad)
    optimizer.step()
    return metrics


def mean_metrics(metrics: torch.Tensor, plan: Plan, accelerator: "Accelerator") -> tuple[float, float]:
    """Return the mean loss and accuracy of the global batch, from what `take_step` returned in each process."""
    if plan.config.elastic is None:
        metrics = accelerator.reduce(metrics, "mean")
    loss, top1 = metrics.tolist()
    return loss, top1


def _compute(
    objective: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    step: int,
    plan: Plan,
    accelerator: "Accelerator",
) -> torch.Tensor:
    """Set the gradients of the global batch; return the mean loss and accuracy of this process's part."""
    _seed(plan.config.seed, step, accelerator.process_index)
    size = len(images)
    total_weight = None
    if plan.balance.class_weights is not None:
        total_weight = accelerator.reduce(_weight(targets, plan), "mean").clamp(min=_SMALL)
    total = torch.zeros(2, device=accelerator.device)
    for part, share in _micro_batches(size, plan):
        with contextlib.nullcontext() if part.stop == size else accelerator.no_sync(objective):
            loss, top1 = objective(images[part], targets[part], total_weight)
            loss = loss * share if total_weight is None else loss
            accelerator.backward(loss)
        total += torch.stack((loss.detach(), top1 * share))
    return total


def _compute_virtual(
    objective: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    step: int,
    plan: Plan,
    accelerator: "Accelerator",
) -> torch.Tensor:
    """Set the gradients of the global batch and the mean of the batch norm statistics of the virtual processes.

    Returns:
        The mean loss and accuracy of the global batch.
    """
    count = plan.config.elastic
    assert count is not None
    tree = Tree(count, accelerator.process_index, accelerator.num_processes, _at_once(accelerator.device))
    # copies, since kernels may depend on the alignment of their inputs
    parts = [[part.clone() for part in tensor.chunk(len(tree.mine))] for tensor in (images, targets)]
    inputs = dict(zip(tree.mine, zip(*parts, strict=True), strict=True))
    total_weight = None
    if plan.balance.class_weights is not None:
        (total,) = tree.sum(lambda index: [_weight(inputs[index][1], plan)])
        total_weight = (total / count).clamp(min=_SMALL)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    before = dict(objective.named_buffers())
    counters: dict[str, torch.Tensor] = {}
    drawing = threading.Lock()  # of random numbers; torch has one generator for all threads

    def compute(index: int) -> Summands:
        own_images, own_targets = inputs[index]
        buffers = {name: buffer.clone() for name, buffer in before.items()}
        metrics = torch.zeros(2, device=accelerator.device)
        gradients: Summands = []
        for part, share in _micro_batches(len(own_images), plan):
            with drawing:
                _seed(plan.config.seed, step, index, part.start)
                loss, top1 = functional_call(objective, buffers, (own_images[part], own_targets[part], total_weight))
            loss = loss * share if total_weight is None else loss
            metrics += torch.stack((loss.detach(), top1 * share))
            # the sum of gradients is their mean then; dividing by a power of two is exact
            scaled = loss / count if accelerator.scaler is None else accelerator.scaler.scale(loss / count)
            found = torch.autograd.grad(scaled, parameters, materialize_grads=True)
            if gradients:
                torch._foreach_add_(gradients, found)
            else:
                gradients = list(found)
        counters.update((name, buffer) for name, buffer in buffers.items() if not buffer.is_floating_point())
        return [metrics, *gradients, *(buffer for buffer in buffers.values() if buffer.is_floating_point())]

    metrics, *sums = tree.sum(compute)
    gradients, statistics = sums[: len(parameters)], sums[len(parameters) :]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # the fused optimizers expect equal strides
        same = gradient.stride() == parameter.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    for buffer in before.values():
        if buffer.is_floating_point():
            buffer.copy_(statistics.pop(0) / count)
    for name, counter in counters.items():  # equal for all virtual processes
        before[name].copy_(counter)
    return metrics / count


_SMALL = 1e-12
"""Least total weight of a batch: one of classes with weight 0 has no loss."""


def _weight(targets: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return the total class weight of targets, a scalar.

    Gradients are averaged over processes, so dividing by the mean of the processes' totals makes the loss a weighted
    mean over the global batch, for any number of processes and micro-batches.
    """
    weights = torch.tensor(plan.balance.class_weights, dtype=torch.float32, device=targets.device)
    return weights_of(targets, weights).sum()


def _micro_batches(size: int, plan: Plan) -> Iterator[tuple[slice, float]]:
    """Yield the micro-batches of a number of images, and their share of it; the last one may be smaller."""
    micro = plan.config.micro_batch_size or size
    for start in range(0, size, micro):
        stop = min(start + micro, size)
        yield slice(start, stop), (stop - start) / size


def _at_once(device: torch.device) -> int:
    """Return the number of virtual processes to compute at the same time: a thread cannot use all cores of a CPU."""
    return max(cores() // local_processes() // torch.get_num_threads(), 1) if device.type == "cpu" else 1


def _seed(*numbers: int) -> None:
    """Seed dropout and stochastic depth, so that no generator state needs to be saved."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
