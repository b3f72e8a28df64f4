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
