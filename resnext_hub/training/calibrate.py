"""Calibrate the published weights: a temperature is fitted on the evaluation split and folded into the classifier.

Every library and runtime that loads the weights then gives calibrated probabilities, without code of its own.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from resnext_hub.models.saved import classifier_names
from resnext_hub.processes.peers import Peers
from resnext_hub.training.acceptance import fit_acceptance
from resnext_hub.training.evaluation import AnyEvaluation, Evaluation
from resnext_hub.training.evaluator import Evaluator
from resnext_hub.training.finetune import has_linear_classifier
from resnext_hub.training.plan import Plan
from resnext_hub.training.temperature import FEWEST, calibration_error, certainties, cross_fitted, fit_temperature

_logger = logging.getLogger(__name__)

_MOST = 10_000
"""Most images whose logits are kept: enough for one number."""

_MOST_VALUES = 20_000_000
"""Most logits that are kept: 160 MB."""

Certainties = tuple[np.ndarray, np.ndarray]
"""The probability of each prediction, `(N,)`, and whether it is right, `(N,)` bool."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A temperature that is folded into the weights of a model, and expected calibration errors, 0 to 1."""

    temperature: float
    """The logits of the trained model were divided by it."""
    images: int
    """Evaluation images that it was fitted on."""
    before: float
    """Error on these images as trained."""
    after: float
    """Error on these images with temperatures that were fitted on others of them (cross-fitted)."""
    before_test: float | None
    """Error on the test split as trained, if there is a test split."""
    shown: tuple[Certainties, Certainties]
    """Predictions before and after, for a diagram: on the test split if there is one, else on the evaluation split,
    cross-fitted."""


@dataclass(frozen=True, kw_only=True)
class Final:
    """Results of the weights to publish."""

    evaluation: AnyEvaluation
    test: AnyEvaluation | None
    """On the test split, if there is one."""
    calibration: Calibration | None
    """None if the weights are as trained."""

    @cached_property
    def accept(self) -> dict[float, float]:
        """For each precision, the lowest probability of an answer such that so many of the answers are right."""
        if not isinstance(self.evaluation, Evaluation):
            return {}
        return fit_acceptance(self.evaluation.probabilities, self.evaluation.predictions == self.evaluation.labels)


def evaluate_and_calibrate(plan: Plan, model: nn.Module, evaluator: Evaluator, peers: Peers) -> Final:
    """Evaluate a model on all splits, and fold a temperature into its classifier unless that changes a prediction.

    Args:
        plan: The run.
        model: The model, with its best weights; those of its classifier change.
        evaluator: Evaluates it with all processes.
        peers: The processes.

    Raises:
        EvaluationStoppedError: If any process received SIGTERM or Ctrl-C.
        RunError: If more images are unreadable than allowed.
    """
    most = min(_MOST, _MOST_VALUES // len(plan.splits.label_names)) if _calibrates(plan, model) else 0
    evaluation = evaluator(model, keep_logits=most)
    if not isinstance(evaluation, Evaluation):
        return Final(evaluation=evaluation, test=_test(plan, model, evaluator, evaluation), calibration=None)
    kept = evaluation.logits
    if kept is None or len(kept.labels) < FEWEST:
        return Final(evaluation=evaluation, test=_test(plan, model, evaluator, evaluation), calibration=None)
    temperature = peers.from_main(lambda: float(f"{fit_temperature(kept.values, kept.labels):.4g}"))
    calibrated = fold(model, temperature, evaluation, evaluator)
    test = _test(plan, model, evaluator, calibrated or evaluation, keep_logits=most)
    if calibrated is None:
        return Final(evaluation=evaluation, test=test, calibration=None)
    before = certainties(kept.values, kept.labels)
    after = certainties(cross_fitted(kept.values, kept.labels), kept.labels)
    before_test, shown = None, (before, after)
    if isinstance(test, Evaluation) and test.logits is not None and len(test.logits.labels):
        trained = certainties(test.logits.values * temperature, test.logits.labels)
        before_test = calibration_error(*trained)
        shown = (trained, (test.probabilities, test.predictions == test.labels))
    calibration = Calibration(
        temperature=temperature,
        images=len(kept.labels),
        before=calibration_error(*before),
        after=calibration_error(*after),
        before_test=before_test,
        shown=shown,
    )
    return Final(evaluation=calibrated, test=test, calibration=calibration)


def _calibrates(plan: Plan, model: nn.Module) -> bool:
    return plan.config.calibrate and not plan.splits.is_multi_label and has_linear_classifier(model)


def _test(
    plan: Plan, model: nn.Module, evaluator: Evaluator, evaluation: AnyEvaluation, keep_logits: int = 0
) -> AnyEvaluation | None:
    if plan.splits.test is None:
        return None
    thresholds = None if isinstance(evaluation, Evaluation) else evaluation.thresholds
    return evaluator(model, "test", thresholds, keep_logits)


@torch.no_grad()
def fold(
    model: nn.Module, temperature: float, before: Evaluation, evaluate: Callable[[nn.Module], AnyEvaluation]
) -> Evaluation | None:
    """Divide the weights of a model's classifier by a temperature, unless that changes a prediction.

    Args:
        model: The model; its weights are as before if a prediction would change.
        temperature: The temperature.
        before: Results of the model.
        evaluate: Evaluates a model.

    Returns:
        Results of the divided weights, or None if a prediction would change.
    """
    weights = [model.get_parameter(name) for name in classifier_names(model)]
    trained = [weight.clone() for weight in weights]
    for weight in weights:
        weight.div_(temperature)
    after = evaluate(model)
    assert isinstance(after, Evaluation)
    if (after.predictions == before.predictions).all() and (after.ranks == before.ranks).all():
        return after
    for weight, old in zip(weights, trained, strict=True):
        weight.copy_(old)
    _logger.warning(
        "the probabilities are not calibrated, because a temperature of %g would change predicted classes", temperature
    )
    return None
