"""The schedule of a run: number of steps, warmup, evaluations and image size."""

import math
from dataclasses import dataclass

from resnext_hub.errors import RequestError, setting
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.optim import lr_at


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of a run; evaluation steps are counted from 1."""

    steps: int
    warmup_steps: int
    """Steps of linear warmup after the head steps."""
    evaluations: frozenset[int]
    head_steps: int = 0
    """Steps at the beginning in which only the classifier is trained."""

    def head_only(self, step: int) -> bool:
        """Return whether only the classifier is trained at a step, counted from 0."""
        return step < self.head_steps

    def lr_at(self, step: int, lr: float) -> float:
        """Return the learning rate of a step, counted from 0; the head steps and the others have a cosine of their own.

        Args:
            step: The step.
            lr: The peak learning rate.
        """
        if self.head_only(step):
            return lr_at(step, self.head_steps, min(self.warmup_steps, self.head_steps // 2), lr)
        return lr_at(step - self.head_steps, self.steps - self.head_steps, self.warmup_steps, lr)


GROWTH = 0.75
"""Fraction of a run in which progressive image sizes grow; the rest is at full size."""

STAGES = 4
"""Number of sizes below the full one; few, because some devices and compilers recompile for each."""


def size_at(step: int, steps: int, first: int | None, full: int) -> int:
    """Return the image size of a step in pixels; it grows from `first` to `full` in stages of equal length.

    Args:
        step: The step, counted from 0.
        steps: Number of steps of the run.
        first: Size of the first stage; None if all steps have the full size.
        full: Size after the last stage.
    """
    if first is None or step >= GROWTH * steps:
        return full
    stage = STAGES * step / (GROWTH * steps)
    return min(first + round((full - first) * int(stage) / STAGES / 8) * 8, full)


def sizes_of(steps: int, first: int | None, full: int) -> list[int]:
    """Return the distinct image sizes of a run in pixels, ascending; see `size_at`."""
    if first is None or steps == 0:
        return [full]
    begins = (min(math.ceil(stage * GROWTH * steps / STAGES), steps - 1) for stage in range(STAGES + 1))
    return sorted({size_at(step, steps, first, full) for step in begins})


def plan_schedule(config: TrainConfig, count: int) -> Schedule:
    """Return the schedule of a run over `count` training samples.

    A run has ceil(epochs * count / batch) steps; every `eval_every` epochs are evaluated at the step that completes
    them.

    Args:
        config: The configuration.
        count: Number of training samples.

    Raises:
        RequestError: If no step would train more than the classifier.
    """
    per_epoch = count / config.batch_size
    steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    evaluations = {steps}
    apart = max(config.eval_every * per_epoch, 1)
    number = int(steps / apart)
    # rounded, because 3 * 0.1 is a little more than 0.3
    evaluations.update(step for k in range(1, number + 1) if (step := math.ceil(round(k * apart, 6))) < steps)
    head = round(config.finetune.head_epochs * per_epoch)
    if head >= steps > 0:
        raise RequestError(
            f"{setting('head_epochs', config.finetune.head_epochs)} leaves no steps of this run for the other layers: "
            f"the run has {steps} steps, {per_epoch:.4g} per epoch; use fewer head epochs, or "
            f"{setting('freeze', 'head')}"
        )
    warmup = min(round(config.optim.warmup_epochs * per_epoch), (steps - head) // 2)
    return Schedule(steps=steps, warmup_steps=warmup, evaluations=frozenset(evaluations), head_steps=head)
