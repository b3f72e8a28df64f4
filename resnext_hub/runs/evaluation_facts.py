"""The results of a run's published weights, as they are recorded."""

from collections.abc import Mapping
from typing import Literal

from resnext_hub.facts import AcceptanceFacts, EvaluationFacts, LabelFacts
from resnext_hub.training.acceptance import cross_measure, measure_acceptance
from resnext_hub.training.evaluation import Evaluation
from resnext_hub.training.loop import Outcome
from resnext_hub.training.multi_label import MultiLabelEvaluation
from resnext_hub.training.plan import Plan

TOP5_CLASSES = 20
"""Number of classes above which top-5 accuracy is reported; with 20 classes, chance level is 25 %."""


def evaluation_facts(plan: Plan, outcome: Outcome, part: Literal["evaluation", "test"]) -> EvaluationFacts:
    """Return the results on a split."""
    classes, final = len(plan.splits.label_names), outcome.final
    evaluation = final.evaluation if part == "evaluation" else final.test
    assert evaluation is not None
    calibrated, before = evaluation.calibration_error, None
    if final.calibration is not None:
        calibrated = final.calibration.after if part == "evaluation" else calibrated
        before = final.calibration.before if part == "evaluation" else final.calibration.before_test
    several = evaluation if isinstance(evaluation, MultiLabelEvaluation) else None
    single = None if isinstance(evaluation, MultiLabelEvaluation) else evaluation
    return EvaluationFacts(
        step=outcome.step,
        epoch=outcome.epoch,
        correct=evaluation.correct,
        count=evaluation.count,
        top1=evaluation.top1,
        loss=evaluation.loss,
        top5=single.top5 if single is not None and classes > TOP5_CLASSES else None,
        macro_f1=evaluation.macro_f1,
        macro_recall=evaluation.macro_recall,
        calibration_error=calibrated,
        uncalibrated_error=before,
        batch_size=plan.config.eval_batch_size,
        accepted=[] if single is None else _acceptance(final.accept, single, part),
        confusion=[] if single is None else single.confusion(classes),
        labels=None if several is None else label_facts(several),
        mean_average_precision=None if several is None else several.mean_average_precision,
        without_tta=evaluation.without_tta,
    )


def _acceptance(accept: Mapping[float, float], evaluation: Evaluation, part: str) -> list[AcceptanceFacts]:
    right = evaluation.predictions == evaluation.labels
    if part == "evaluation":
        return cross_measure(evaluation.probabilities, right)
    return measure_acceptance(accept, evaluation.probabilities, right)


def label_facts(evaluation: MultiLabelEvaluation) -> list[LabelFacts]:
    """Return the results for each label of an evaluation."""
    columns = (evaluation.positives, evaluation.predicted, evaluation.true_positives, evaluation.thresholds)
    rows = zip(*(column.tolist() for column in columns), evaluation.average_precisions, strict=True)
    return [
        LabelFacts(
            positives=positives,
            predicted=predicted,
            true_positives=right,
            average_precision=average_precision,
            threshold=threshold,
        )
        for positives, predicted, right, threshold, average_precision in rows
    ]
