"""The parts of a run's record: facts about its model, dataset, results and machine."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

if TYPE_CHECKING:
    import numpy as np

Count = Annotated[int, Meta(ge=0)]
Some = Annotated[int, Meta(ge=1)]
Amount = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1.0001)]
"""0 to 1, plus rounding."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was trained."""

    requested: str
    """The requested model: a name, `hf-hub:…`, or `local-dir:` with the folder's own name."""
    architecture: str
    """timm architecture that builds the model; one of this package only if stock timm has no equivalent."""
    model_args: dict[str, Any]
    """Arguments that differ from the architecture's defaults."""
    needs_plugin: bool
    parameters: Count
    variant: str | None
    """Name in this package, and its template such as 32x4d, if it is a variant of the family."""
    template: str | None
    input: dict[str, Any]
    """Preprocessing for evaluation in timm's keys: input_size, interpolation, mean, std, crop_pct, crop_mode."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class BaseModelFacts:
    """The weights that training started from."""

    id: str
    hub_id: str | None
    """Repository on the Hub, without a revision; None for a local folder."""
    license: str | None


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """The dataset."""

    id: str
    hub_id: str | None
    revision: str | None
    fingerprint: str
    train_split: str
    eval_split: str | None
    """None if the evaluation images were held out of the training split."""
    test_split: str | None = None
    """None if the test images were held out of the training split, or there was no test."""
    train_count: Count | None
    """None for a stream of unknown length."""
    eval_count: Count
    train_counts: list[Count] | None
    """Images by class; None for a stream."""
    eval_counts: list[Count] | None
    test_count: Count = 0
    test_counts: list[Count] | None = None


@dataclass(frozen=True, kw_only=True)
class LabelFacts:
    """Results for one label of images that can have several."""

    positives: Count
    """Images that have the label."""
    predicted: Count
    """Images for which it is predicted."""
    true_positives: Count
    """Images for which it is predicted and that have it."""
    average_precision: Fraction | None
    """Average precision over all thresholds; None if no image has the label."""
    threshold: Fraction
    """Lowest probability at which it is predicted, chosen on the evaluation split."""


@dataclass(frozen=True, kw_only=True)
class AcceptanceFacts:
    """How often a model is sure enough for a requested precision, and how often it is right then."""

    precision: Fraction
    """The requested precision: of the accepted answers, at least this fraction should be right."""
    answered: Count
    """Images whose answer is accepted."""
    right: Count
    """Those of them whose answer is right."""
    count: Some
    """All images. None of them was fitted on: on the evaluation split, the facts are cross-fitted."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """Results of the published weights on the evaluation or the test split."""

    step: Count
    epoch: Amount
    correct: Count
    """Images whose class is right, or with several labels, of which all are right."""
    count: Some
    top1: Fraction
    """The fraction of these images."""
    loss: float
    top5: Fraction | None
    """None with too few classes for top-5 accuracy to mean much."""
    macro_f1: Fraction
    macro_recall: Fraction | None = None
    """Mean recall of the classes, also called balanced accuracy; None in records of versions without it."""
    calibration_error: Fraction
    """Expected calibration error over 15 bins, 0 to 1. On the evaluation split, the temperature of a calibration is
    cross-fitted: each image gets one that was fitted on other images."""
    uncalibrated_error: Fraction | None = None
    """The same before calibration; None without calibration."""
    batch_size: Some
    """Batch size of every forward pass; the last bits of float32 logits depend on it."""
    accepted: list[AcceptanceFacts] = field(default_factory=list)
    """By precision; empty in records of versions without it, if nothing could be fitted, and if an image can have
    several labels."""
    confusion: list[list[tuple[Count, Some]]]
    """For each true class, the predicted classes with their counts; only those that occur. Empty if an image can have
    several labels."""
    without_tta: Fraction | None = None
    """With test-time augmentation: top1, or with several labels the mean average precision, without it."""
    labels: list[LabelFacts] | None = None
    """Results for each label if an image can have several, else None."""
    mean_average_precision: Fraction | None = None
    """Mean of the average precisions of the labels that occur, if an image can have several."""

    def __post_init__(self) -> None:
        """Refuse results that contradict themselves, as in a damaged file.

        Raises:
            ValueError: If two parts contradict each other.
        """
        if self.labels is not None:
            self._require_labels(self.labels)
            return
        classes, columns = len(self.confusion), [column for row in self.confusion for column, _ in row]
        right = sum(count for label, row in enumerate(self.confusion) for column, count in row if column == label)
        for holds, what in (
            (sum(self.measured) == self.count, "confusion to add up to count"),
            (all(0 <= column < classes for column in columns), "all columns of confusion to be classes"),
            (
                all(len(dict(row)) == len(row) for row in self.confusion),
                "each column to occur only once in a row of confusion",
            ),
            (0 <= self.correct <= self.count > 0, "0 <= correct <= count"),
            (self.correct == right, "correct to be the diagonal of confusion"),
            (abs(self.top1 * self.count - self.correct) < 1e-6, "top1 to be correct / count"),
        ):
            if not holds:
                raise ValueError(f"expected {what}")

    def _require_labels(self, labels: list[LabelFacts]) -> None:
        for holds, what in (
            (self.mean_average_precision is not None, "mean_average_precision"),
            (not self.confusion, "no confusion for images with several labels"),
            (0 <= self.correct <= self.count, "0 <= correct <= count"),
            (abs(self.top1 * self.count - self.correct) < 1e-6, "top1 to be correct / count"),
            (
                all(max(label.positives, label.predicted) <= self.count for label in labels),
                "positives and predicted <= count",
            ),
            (
                all(label.true_positives <= min(label.positives, label.predicted) for label in labels),
                "true_positives <= positives and predicted",
            ),
        ):
            if not holds:
                raise ValueError(f"expected {what}")

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels is not None

    @property
    def matrix(self) -> "np.ndarray":
        """Confusion matrix `(classes, classes)` int64: rows are true classes, columns predicted ones."""
        import numpy as np

        dense = np.zeros((len(self.confusion), len(self.confusion)), dtype=np.int64)
        for label, row in enumerate(self.confusion):
            for prediction, count in row:
                dense[label, prediction] = count
        return dense

    @property
    def measured(self) -> list[int]:
        """Number of readable evaluation images of each class."""
        if self.labels is not None:
            return [label.positives for label in self.labels]
        return [sum(count for _, count in row) for row in self.confusion]


@dataclass(frozen=True, kw_only=True)
class CalibrationFacts:
    """The temperature that the published weights contain."""

    temperature: Annotated[float, Meta(gt=0)]
    """The logits of the trained model were divided by it."""
    images: Some
    """Evaluation images that it was fitted on."""


@dataclass(frozen=True, kw_only=True)
class OodFacts:
    """How well the score of out-of-distribution images tells those of another dataset from held-out images."""

    dataset: str
    """Description of the other dataset."""
    images: Some
    auroc: Fraction
    """Area under the ROC curve: the probability that an image of it has a higher score than a held-out image."""
    max_softmax_auroc: Fraction
    """The same for 1 minus the largest probability as the score."""
    flagged: Count
    """Images of it whose score is above 0, as that of 5 % of the held-out images is."""


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """Output of the published weights for one evaluation sample."""

    index: Count
    """Index in the evaluation split."""
    label: str | list[str]
    """Its class, or its labels if an image can have several."""
    output: list[tuple[str, Fraction]]
    """The most probable classes with their probabilities, the first one first."""

    @property
    def labels(self) -> list[str]:
        """Its class or classes."""
        return [self.label] if isinstance(self.label, str) else self.label


@dataclass(frozen=True, kw_only=True)
class HardwareFacts:
    """The machine that the run was computed on."""

    device: str
    name: str
    """Product name of the processor or accelerator."""
    threads: Some
    mixed_precision: Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class UnreadableImage:
    """An image that could not be decoded, and why."""

    split: Literal["training", "evaluation", "test"]
    image: str
    reason: str
