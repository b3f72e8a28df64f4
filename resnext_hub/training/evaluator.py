"""Evaluation during a run: the weights to publish, on the evaluation split, over all processes."""

from typing import Any

import torch
from torch import nn

from resnext_hub.training.evaluation import Evaluation, evaluate
from resnext_hub.training.feed import evaluation_samples
from resnext_hub.training.plan import Plan
from resnext_hub.training.state import TrainingState
from resnext_hub.training.stop import StopSignal
from resnext_hub.training.unreadable import UnreadableLog


class Evaluator:
    """Evaluates a model in the same way as `resnext-hub evaluate` evaluates the published one.

    Args:
        plan: The run.
        state: Its state; batch norm statistics are synchronized over the processes before each evaluation.
        stop: Tells whether a signal has asked the run to stop.
        unreadable: Counts unreadable images.
    """

    def __init__(self, plan: Plan, state: TrainingState, stop: StopSignal, unreadable: UnreadableLog) -> None:
        self._plan, self._state, self._stop, self._unreadable = plan, state, stop, unreadable
        self._samples = evaluation_samples(plan.splits.eval, plan.input, plan.config.loader.max_image_pixels)

    def __call__(self, model: nn.Module) -> Evaluation:
        """Evaluate a model.

        Raises:
            EvaluationStoppedError: If any process received SIGTERM or Ctrl-C.
            RunError: If more images are unreadable than allowed.
        """
        accelerator = self._state.accelerator
        self._state.synchronize_buffers()
        workers = self._plan.config.loader.workers
        assert workers is not None
        evaluation = evaluate(
            model,
            self._samples,
            batch_size=self._plan.config.eval_batch_size,
            device=accelerator.device,
            workers=workers,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            sum_over_processes=self._sum,
            stop_requested=lambda: self._stop.requested,
        )
        missing = evaluation.total - evaluation.count
        self._unreadable.note("evaluation", evaluation.total, evaluation.unreadable, missing)
        return evaluation

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        accelerator: Any = self._state.accelerator
        if accelerator.num_processes == 1:
            return values
        total: torch.Tensor = accelerator.reduce(values.to(accelerator.device), "sum")
        return total.cpu()
