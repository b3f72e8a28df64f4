"""The time and memory that a run will take, from a few of its own steps and evaluation batches.

They are taken with a separate model, which is discarded, so the run itself is not affected.
"""

import contextlib
import itertools
import resource
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from resnext_hub.data.images import IndexedImages
from resnext_hub.kernels.training_view import agree_on_factors, build_training_view
from resnext_hub.training.feed import StepInputs, evaluation_samples, training_batches
from resnext_hub.training.finetune import freeze, set_training
from resnext_hub.training.objective import build_objective
from resnext_hub.training.optim import build_optimizer
from resnext_hub.training.plan import Plan
from resnext_hub.training.schedule import size_at

if TYPE_CHECKING:
    from accelerate import Accelerator

FEWEST_STEPS = 60
"""Number of steps below which a run takes little longer than the measurement."""

_SECONDS = 3.0
"""Time after which the measurement of steps at one image size, or of evaluation, ends."""

_SHARE = 0.02
"""Fraction of the predicted time after which it ends, if that is sooner, so that a short run starts soon."""

_MOST = 20
"""Most steps over all image sizes, and most evaluation batches, to measure."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a whole run will take."""

    seconds: float
    """Wall time of all steps and evaluations."""
    memory: int
    """Peak memory of a process in bytes: on a CPU its resident memory, otherwise what it allocates on the device."""


def estimate(plan: Plan, accelerator: "Accelerator") -> Estimate | None:
    """Measure a few steps and evaluation batches; every process has to call this.

    Args:
        plan: The run.
        accelerator: The accelerator of this process.

    Returns:
        The estimate; None for a short run, and for a stream, whose beginning would be read twice.
    """
    if plan.schedule.steps < FEWEST_STEPS or not isinstance(plan.splits.train, IndexedImages):
        return None
    config, device = plan.config, accelerator.device
    model = plan.source.saved.build(len(plan.splits.label_names), config.drop_rate, config.drop_path)
    model = model.to(device).to(memory_format=torch.channels_last)
    shape = (config.images_per_pass(accelerator.num_processes), *plan.input.input_size)
    factors = agree_on_factors(model, shape, config.merge_groups, plan.precision, accelerator)
    sizes = _steps_by_size(plan)
    seconds = 0.0
    step_times = _time_steps(plan, model, factors, list(sizes), accelerator)
    for size, step_time in step_times.items():
        seconds += sizes[size] * step_time
    per_image = _time_evaluation(plan, model, device)
    evaluated = (len(plan.schedule.evaluations) + 1) * plan.splits.eval.count
    evaluated += 0 if plan.splits.test is None else plan.splits.test.count
    return Estimate(seconds=seconds + evaluated * per_image / accelerator.num_processes, memory=_peak_memory(device))


def _steps_by_size(plan: Plan) -> dict[int, float]:
    """Return the number of steps at each image size."""
    steps, first, full = plan.schedule.steps, plan.config.progressive_size, plan.input.image_size
    tried = min(steps, 1000)
    sizes = Counter(size_at(number * steps // tried, steps, first, full) for number in range(tried))
    return {size: count * steps / tried for size, count in sizes.items()}


def _time_steps(
    plan: Plan, model: torch.nn.Module, factors: dict[str, int], sizes: list[int], accelerator: "Accelerator"
) -> dict[int, float]:
    """Return the seconds of a step at each image size, loading its images included."""
    config, device = plan.config, accelerator.device
    steps, first, full = plan.schedule.steps, config.progressive_size, plan.input.image_size
    batches = training_batches(
        plan,
        start=0,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        pin_memory=device.type == "cuda",
    )
    inputs = StepInputs(plan, device=device, process=accelerator.process_index)
    freeze(model, config.finetune.frozen(model, head_only=False))
    view = build_training_view(model, factors)
    objective = build_objective(plan, view, device).train()
    set_training(view)
    optimizer = build_optimizer(model, config.optim)
    micro = config.images_per_pass(accelerator.num_processes)
    found = {}
    with contextlib.closing(batches):
        for size in sizes:
            at = next(step for step in range(steps) if size_at(step, steps, first, full) == size)
            times: list[float] = []
            for _ in range(max(_MOST // len(sizes), 3)):
                begin = time.monotonic()
                batch = next(batches)  # a measured run has more steps than are measured
                images, targets = inputs(batch, at)
                optimizer.zero_grad()
                for some, labels in zip(images.split(micro), targets.split(micro), strict=True):
                    with accelerator.autocast():
                        loss, _ = objective(some, labels, torch.ones((), device=device))
                    loss.backward()
                loss.item()  # waits for the device
                times.append(time.monotonic() - begin)
                mean = sum(times[1:]) / max(len(times) - 1, 1)
                if len(times) > 2 and sum(times) > min(_SECONDS, _SHARE * mean * steps):
                    break
            measured = times[1:] or times  # the first one prepares the kernels
            found[size] = sum(measured) / len(measured)
    return found


def _time_evaluation(plan: Plan, model: torch.nn.Module, device: torch.device) -> float:
    """Return the seconds to evaluate an image, loading included."""
    samples = evaluation_samples(plan.splits.eval, plan.input, plan.config.loader.max_image_pixels)
    size = plan.config.eval_batch_size
    workers = plan.config.loader.workers or 0
    model.eval()
    times, images = [], 0
    with torch.inference_mode(), contextlib.closing(samples.batches(size, 0, 1, workers, False)) as batches:
        begin = time.monotonic()
        for batch in itertools.islice(batches, _MOST):
            model(batch.images.to(device).contiguous(memory_format=torch.channels_last)).float().cpu()
            times.append(time.monotonic() - begin)
            images += len(batch.indices)
            begin = time.monotonic()
            if sum(times) > _SECONDS / 2:
                break
    seconds = sum(times[1:] or times) / max(images - size, 1) if len(times) > 1 else sum(times) / max(images, 1)
    return seconds if plan.config.tta == "none" else 2 * seconds


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
