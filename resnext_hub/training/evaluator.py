"""Evaluation of the weights to publish during and at the end of a run, over all processes."""

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from resnext_hub.training.evaluation import AnyEvaluation, evaluate
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
        most = plan.config.loader.max_image_pixels
        self._samples = {
            part: evaluation_samples(images, plan.input, most) for part, images in plan.splits.evaluated.items()
        }

    def __call__(
        self,
        model: nn.Module,
        part: Literal["evaluation", "test"] = "evaluation",
        thresholds: np.ndarray | None = None,
        keep_logits: int = 0,
    ) -> AnyEvaluation:
        """Evaluate a model.

        Args:
            model: The model.
            part: The split to evaluate it on.
            thresholds: Lowest probability at which each label is predicted, if an image can have several; the best ones
                for this split if not given.
            keep_logits: Number of images whose logits are kept, if an image has one label.

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
            self._samples[part],
            batch_size=self._plan.config.eval_batch_size,
            device=accelerator.device,
            workers=workers,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            sum_over_processes=self._sum,
            stop_requested=lambda: self._stop.requested,
            thresholds=thresholds,
            tta=self._plan.config.tta,
            keep_logits=keep_logits,
        )
        missing = evaluation.total - evaluation.count
        self._unreadable.note(part, evaluation.total, evaluation.unreadable, missing)
        return evaluation

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        accelerator: Any = self._state.accelerator
        if accelerator.num_processes == 1:
            return values
        total: torch.Tensor = accelerator.reduce(values.to(accelerator.device), "sum")
        return total.cpu()
