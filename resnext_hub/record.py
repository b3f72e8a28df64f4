"""Every fact about a finished run, in one JSON file that training writes and everything after it reads."""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from msgspec import Meta

from resnext_hub.errors import RequestError
from resnext_hub.files import convert, read_json, write_json
from resnext_hub.text import printable

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 3
"""Version 2 made the confusion matrix sparse; version 3 renamed `broken_pictures` to `unreadable_images`."""

PLOTS = ("curves.png", "confusion_matrix.png", "labels.png")
"""Plots of a model folder, which its card shows and which are published."""

_Count = Annotated[int, Meta(ge=0)]
_Some = Annotated[int, Meta(ge=1)]
_Amount = Annotated[float, Meta(ge=0)]
_Fraction = Annotated[float, Meta(ge=0, le=1.0001)]
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
    parameters: _Count
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
    train_count: _Count | None
    """None for a stream of unknown length."""
    eval_count: _Count
    train_counts: list[_Count] | None
    """Images by class; None for a stream."""
    eval_counts: list[_Count] | None
    test_count: _Count = 0
    test_counts: list[_Count] | None = None


@dataclass(frozen=True, kw_only=True)
class LabelFacts:
    """Results for one label of images that can have several."""

    positives: _Count
    """Images that have the label."""
    predicted: _Count
    """Images for which it is predicted."""
    true_positives: _Count
    """Images for which it is predicted and that have it."""
    average_precision: _Fraction | None
    """Average precision over all thresholds; None if no image has the label."""
    threshold: _Fraction
    """Lowest probability at which it is predicted, chosen on the evaluation split."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """Results of the published weights on the evaluation or the test split."""

    step: _Count
    epoch: _Amount
    correct: _Count
    """Images whose class is right, or with several labels, of which all are right."""
    count: _Some
    top1: _Fraction
    """The fraction of these images."""
    loss: float
    top5: _Fraction | None
    """None with too few classes for top-5 accuracy to mean much."""
    macro_f1: _Fraction
    macro_recall: _Fraction | None = None
    """Mean recall of the classes, also called balanced accuracy; None in records of versions without it."""
    calibration_error: _Fraction
    """Expected calibration error over 15 bins, 0 to 1."""
    batch_size: _Some
    """Batch size of every forward pass; the last bits of float32 logits depend on it."""
    confusion: list[list[tuple[_Count, _Some]]]
    """For each true class, the predicted classes with their counts; only those that occur. Empty if an image can have
    several labels."""
    without_tta: _Fraction | None = None
    """With test-time augmentation: top1, or with several labels the mean average precision, without it."""
    labels: list[LabelFacts] | None = None
    """Results for each label if an image can have several, else None."""
    mean_average_precision: _Fraction | None = None
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
            (sum(self.measured) == self.count, "confusion to sum up to count"),
            (all(0 <= column < classes for column in columns), "columns of confusion that are classes"),
            (all(len(dict(row)) == len(row) for row in self.confusion), "each column of a row of confusion once"),
            (0 <= self.correct <= self.count > 0, "0 <= correct <= count"),
            (self.correct == right, "correct to be the diagonal of confusion"),
            (abs(self.top1 * self.count - self.correct) < 1e-6, "top1 to be correct / count"),
        ):
            if not holds:
                raise ValueError(f"expected {what}")

    def _require_labels(self, labels: list[LabelFacts]) -> None:
        for holds, what in (
            (self.mean_average_precision is not None, "mean_average_precision"),
            (not self.confusion, "no confusion of several labels"),
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
class SampleFacts:
    """Output of the published weights for one evaluation sample."""

    index: _Count
    """Index in the evaluation split."""
    label: str | list[str]
    """Its class, or its labels if an image can have several."""
    output: list[tuple[str, _Fraction]]
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
    threads: _Some
    mixed_precision: Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class UnreadableImage:
    """An image that could not be decoded, and why."""

    split: Literal["training", "evaluation", "test"]
    image: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run."""

    format_version: int = FORMAT_VERSION
    name: str
    config: dict[str, Any]
    """The resolved configuration, flat; a local dataset is reduced to its folder's name."""
    changed: list[str]
    """Settings that are not at their defaults."""
    command: str
    """The non-default settings, as a command that repeats the run."""
    model: ModelFacts
    base_model: BaseModelFacts | None
    dataset: DatasetFacts
    label_names: list[str]
    steps: _Count
    planned_steps: _Count | None = None
    """Steps that the run would have had without early stopping; None in records of versions without it."""
    epochs: _Amount
    """Passes over the training split."""
    evaluation: EvaluationFacts
    """On the split that chose the weights."""
    test: EvaluationFacts | None = None
    """On the test split, measured once; None if there was no test."""
    sample: SampleFacts
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    versions: dict[str, str]
    hardware: HardwareFacts
    processes: _Some
    git_commit: str | None
    wall_seconds: _Amount
    resumes: _Count
    skipped_steps: _Count
    """Steps that the optimizer skipped because fp16 gradients overflowed."""
    decoders: list[str] = field(default_factory=list)
    """Decoders of the training images, in order of use: several if a run was resumed with another one."""
    unreadable_images: list[UnreadableImage] = field(default_factory=list)
    plots: list[str] = field(default_factory=lambda: list(PLOTS[:2]))
    """Plots in the model folder."""
    merged_groups: dict[str, _Some] = field(default_factory=dict)
    """Number of neighboring groups that were computed as one in training, by layer name."""
    class_weights: list[_Amount] | None = None
    """Weight of each class in the training loss; None if all were equal."""

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step, because it did not improve any more."""
        return self.planned_steps is not None and self.steps < self.planned_steps

    @property
    def reported(self) -> EvaluationFacts:
        """The results that describe the weights best: on the test split if there is one."""
        return self.evaluation if self.test is None else self.test

    def __post_init__(self) -> None:
        """Refuse a record that contradicts itself, as a damaged file does.

        Raises:
            ValueError: If two parts contradict each other.
        """
        classes, dataset = len(self.label_names), self.dataset
        evaluations = [(self.evaluation, dataset.eval_count)]
        if self.test is not None:
            evaluations.append((self.test, dataset.test_count))
        size = self.model.input.get("input_size")
        for holds, what in (
            (all(len(part.measured) == classes for part, _ in evaluations), "results for each class"),
            (all(part.count <= count for part, count in evaluations), "count <= eval_count and test_count"),
            (
                all(part.step <= self.steps for part, _ in evaluations),
                "the step of an evaluation to be one of the steps",
            ),
            (re.fullmatch("[0-9a-f]{64}", self.model.weights_sha256), "a SHA-256 in weights_sha256"),
            (_is_count_of(dataset.train_counts, classes), "train_counts of each class"),
            (_is_count_of(dataset.eval_counts, classes), "eval_counts of each class"),
            (_is_count_of(dataset.test_counts, classes), "test_counts of each class"),
            (len({part.is_multi_label for part, _ in evaluations}) == 1, "the same kind of labels in both splits"),
            (self.class_weights is None or len(self.class_weights) == classes, "class_weights of each class"),
            (set(self.changed) <= self.config.keys(), "settings in changed that are in config"),
            (self.config.keys() >= _CARD_SETTINGS, f"config with {', '.join(sorted(_CARD_SETTINGS))}"),
            (
                isinstance(size, list) and [type(n) for n in size] == [int] * 3 and min(size) > 0,
                "an input_size of three positive numbers",
            ),
            (self.sample.output, "an output of the sample"),
            (
                {*self.label_names} >= {*self.sample.labels, *(name for name, _ in self.sample.output)},
                "classes in sample that are in label_names",
            ),
            (set(self.plots) <= set(PLOTS), f"plots of {', '.join(PLOTS)}"),
        ):
            if not holds:
                raise ValueError(f"expected {what}")

    def save(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Load a record of this format version or of an earlier one, which is converted.

        Raises:
            RequestError: If there is none, it is damaged, or its version is unknown.
        """
        if not os.path.lexists(path):
            _refuse_missing(path)
        content = read_json(path, dict[str, Any], _WAY_OUT)
        version = content.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
            raise RequestError(
                f"{printable(path)} has format version {printable(version)[:40]}; this version of resnext-hub reads 1 "
                f"to {FORMAT_VERSION}; update resnext-hub, or " + _WAY_OUT
            )
        return convert(_upgraded(content, version), cls, path, _WAY_OUT)


_WAY_OUT = "remove it, and rerun the training command to write it again"

_CARD_SETTINGS = frozenset({"split_seed", "ema", "streaming", "shuffle_block"})
"""Settings that a card mentions."""


def sparse_rows(dense: Iterable[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Return the nonzero entries of each row of a matrix, as (column, value)."""
    return [[(column, value) for column, value in enumerate(row) if value] for row in dense]


def _upgraded(content: dict[str, Any], version: int) -> dict[str, Any]:
    """Convert a record of an earlier version; malformed parts are left for validation to reject."""
    content = content | {"format_version": FORMAT_VERSION}
    evaluation = content.get("evaluation")
    rows = evaluation.get("confusion") if isinstance(evaluation, dict) and version < 2 else None
    if isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(rows) for row in rows):
        content["evaluation"] = dict(evaluation or {}, confusion=sparse_rows(rows))
    if version < 3 and isinstance(entries := content.pop("broken_pictures", None), list):
        content["unreadable_images"] = [renamed_image(entry) for entry in entries]
    return content


def renamed_image(entry: Any) -> Any:
    """Return an entry about an unreadable image with today's key; before version 3 the key was `picture`."""
    if not isinstance(entry, dict) or "picture" not in entry:
        return entry
    return {"image" if name == "picture" else name: value for name, value in entry.items()}


def _refuse_missing(path: Path) -> NoReturn:
    folder = path.parent
    if not os.path.isdir(folder):
        raise RequestError(f"{printable(folder)} does not exist")
    if os.path.lexists(folder / "config.yaml"):
        raise RequestError(
            f"the run in {printable(folder)} is not finished; rerun its training command, which resumes it"
        )
    hint = f"; did you mean {printable(folder.parent)}?" if os.path.isfile(folder.parent / "record.json") else ""
    raise RequestError(f"{printable(folder)} has no record.json, so it is not a run folder{hint}")


def _is_count_of(counts: list[int] | None, classes: int) -> bool:
    return counts is None or (len(counts) == classes and all(count >= 0 for count in counts))
