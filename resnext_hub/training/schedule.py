"""What happens at which step of a run."""

import math
from dataclasses import dataclass

from resnext_hub.errors import RequestError
from resnext_hub.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What happens at which step, counted from 1."""

    steps: int
    warmup_steps: int
    evaluations: frozenset[int]


GROWTH = 0.75
"""Part of a run in which the images grow, where they do; in the rest they have their full size."""

STAGES = 4
"""Sizes below the full one: few, as some devices and compilers prepare anew for each."""


def size_at(step: int, steps: int, first: int | None, full: int) -> int:
    """Give the size in pixels at which a step trains: it grows from `first` to `full`, in stages of equal length.

    Args:
        step: The step, counted from 0.
        steps: Steps of the run.
        first: Size of the first stage; None if all steps have the full size.
        full: Size of the last part of the run.
    """
    stage = STAGES * step / (GROWTH * steps)
    if first is None or stage >= STAGES:
        return full
    return min(first + round((full - first) * int(stage) / STAGES / 8) * 8, full)


def sizes_of(steps: int, first: int | None, full: int) -> list[int]:
    """Give the sizes in pixels at which the steps of a run train, as `size_at` has them, each once, small to large."""
    begins = (min(math.ceil(stage * GROWTH * steps / STAGES), steps - 1) for stage in range(STAGES + 1))
    return sorted({size_at(step, steps, first, full) for step in begins})


def plan_schedule(config: TrainConfig, count: int | None) -> Schedule:
    """Give the schedule of a run over `count` training samples.

    A run has ceil(epochs * count / batch) steps, and an epoch is evaluated at the step that completes it. Which step
    that is shows in a stream only when it is read, so there only the last step stands here; of unknown length, a
    stream warms up over a twentieth of the steps.

    Raises:
        RequestError: If the number of steps does not follow from anything.
    """
    if count is None:
        if config.max_steps is None:
            raise RequestError(
                f"{config.data.dataset} does not say how many samples it has, so --streaming needs --max-steps"
            )
        warmup = config.max_steps // 20 if config.optim.warmup_epochs else 0
        return Schedule(steps=config.max_steps, warmup_steps=warmup, evaluations=frozenset({config.max_steps}))
    per_epoch = count / config.batch_size
    steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    evaluations = {steps}
    epoch = config.eval_every
    while not config.data.streaming and math.ceil(epoch * per_epoch) < steps:
        evaluations.add(math.ceil(epoch * per_epoch))
        epoch += config.eval_every
    warmup = min(round(config.optim.warmup_epochs * per_epoch), steps // 2)
    return Schedule(steps=steps, warmup_steps=warmup, evaluations=frozenset(evaluations))
