"""Learning rate range test (Smith, 2017, arXiv 1506.01186): a short training run at an exponentially growing rate."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from resnext_hub.processes.peers import Peers
from resnext_hub.training.feed import StepInputs, training_batches
from resnext_hub.training.finetune import freeze, set_training
from resnext_hub.training.objective import build_objective
from resnext_hub.training.optim import set_lr
from resnext_hub.training.plan import Plan
from resnext_hub.training.schedule import Schedule
from resnext_hub.training.state import TrainingState
from resnext_hub.training.step import mean_metrics, prepare_objective, take_step

if TYPE_CHECKING:
    from accelerate import Accelerator

STEPS = 100
LOWEST, HIGHEST = 1e-7, 10.0
"""Steps of a whole test, and the learning rates of its first and last step, as in fastai."""

MEMORY = 0.98
"""Weight of earlier losses in the moving average that smooths them, as in fastai."""

DIVERGED = 4.0
"""The test ends when the smoothed loss is this multiple of its minimum, as in fastai."""

_FIRST, _LAST = STEPS // 10, 5
"""Steps at the beginning and at the end of a test that the suggestion ignores: too few losses, or diverging ones."""


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The losses of a range test; they are those of the training batches, as augmented."""

    lrs: list[float]
    """Learning rate of each step, as the setting `lr`: some layers may have a multiple of it."""
    losses: list[float]
    """Mean loss of the global batch of each step."""
    smoothed: list[float]
    """Exponential moving averages of the losses, corrected for their start."""
    diverged: bool
    """Whether the test ended because the loss grew too much, or was not finite."""

    @property
    def suggestion(self) -> float | None:
        """A peak learning rate, by the rule `valley`; None if the loss did not fall."""
        return valley(self.lrs[_FIRST:-_LAST], self.smoothed[_FIRST:-_LAST])


def range_test(plan: Plan, model: nn.Module, accelerator: "Accelerator", peers: Peers) -> RangeTest:
    """Train for a few steps at growing learning rates; nothing is written, and every process has to call this.

    Model, data, augmentation, optimizer and batch size are those of the run. There is no warmup or head-only phase, and
    images have their full size.

    Args:
        plan: The run.
        model: The model in its initial state; its weights are useless afterwards.
        accelerator: The accelerator of this process.
        peers: The processes of the run.
    """
    plan = _whole_range(plan)
    config, process = plan.config, accelerator.process_index
    state = TrainingState(plan, model, accelerator, peers)
    freeze(state.model, config.finetune.frozen(state.model, head_only=False))
    view = state.build_view()
    objective = prepare_objective(build_objective(plan, view, accelerator.device), plan, accelerator)
    optimizer = accelerator.prepare(state.optimizer, device_placement=[False])
    objective.train()
    set_training(view)
    inputs = StepInputs(plan, device=accelerator.device, process=process)
    batches = training_batches(
        plan,
        start=0,
        process=process,
        processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    diverged = False
    with contextlib.closing(batches):
        for step in range(STEPS):
            lr = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
            set_lr(state.optimizer, lr)
            images, targets = inputs(next(batches), step)
            metrics = take_step(objective, optimizer, images, targets, step, plan, accelerator)
            loss, _ = mean_metrics(metrics, plan, accelerator)
            if not math.isfinite(loss):
                diverged = True
                break
            lrs.append(lr)
            losses.append(loss)
            smoothed.append(_smooth(losses))
            if smoothed[-1] > DIVERGED * min(smoothed):
                diverged = True
                break
    return RangeTest(lrs=lrs, losses=losses, smoothed=smoothed, diverged=diverged)


def _whole_range(plan: Plan) -> Plan:
    """Return a plan of as many steps as a test has, without what only a whole run needs."""
    config = dataclasses.replace(plan.config, ema=None, progressive_size=None)
    return dataclasses.replace(
        plan,
        config=config,
        schedule=Schedule(steps=STEPS, warmup_steps=0, evaluations=frozenset({STEPS})),
    )


def _smooth(losses: Sequence[float]) -> float:
    """Return the exponential moving average of losses, divided by the sum of their weights."""
    weights = [MEMORY**age for age in reversed(range(len(losses)))]
    return math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / math.fsum(weights)


def valley(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return a learning rate from the longest stretch of falling losses; None if no loss is below an earlier one.

    The rule of this name in fastai: the longest falling subsequence is found, and the learning rate is that half way
    through the number of losses that it contains, counted back from its last one.

    Args:
        lrs: Ascending learning rates.
        losses: Smoothed losses at these.
    """
    lengths = [1] * len(losses)  # of the longest falling subsequence that ends at each loss
    for last, loss in enumerate(losses):
        lengths[last] += max((lengths[i] for i in range(last) if losses[i] > loss), default=0)
    longest = max(lengths, default=0)
    if longest < 2:
        return None
    end = lengths.index(longest)
    start = max(end - longest, 0)
    third = (end - start) / 3
    return lrs[start + int(third) + int(third / 2)]
