"""The results of a cross-validation over all folds, in folds.json and predictions.parquet."""

import dataclasses
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnext_hub.cards.model_card import wilson_interval
from resnext_hub.data.images import IndexedImages
from resnext_hub.facts import EvaluationFacts
from resnext_hub.files import write_atomic, write_json
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.training.plan import Plan

FORMAT_VERSION = 1
"""Format version of folds.json."""


@dataclass(frozen=True, kw_only=True)
class FoldFacts:
    """The results of one fold: of the images that its model was not trained on."""

    fold: int
    """Its number, from 1."""
    step: int
    """Step of the weights."""
    correct: int
    count: int
    top1: float
    loss: float
    macro_recall: float | None
    mean_average_precision: float | None
    """With several labels per image."""
    test: float | None
    """Accuracy, or with several labels mean average precision, on the test split, if there is one."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of a figure over the folds."""

    mean: float
    low: float
    high: float
    """95 % t interval of the mean. The training sets of the folds overlap, so it is somewhat too narrow (Bengio and
    Grandvalet, 2004)."""


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """The results of a cross-validation."""

    format_version: int = FORMAT_VERSION
    dataset: str
    label_names: list[str]
    split_seed: int
    best_by: str
    """What selected the weights of each fold: `last` if nothing did; otherwise a metric on the evaluated images, which
    makes the results optimistic."""
    folds: list[FoldFacts]
    correct: int
    """Number of correct predictions for all images, each made by the model that was not trained on the image."""
    count: int
    accuracy: float
    low: float
    high: float
    """Upper end of the 95 % Wilson interval of the accuracy; `low` is the lower end."""
    mean_accuracy: Mean
    """Mean of the accuracies of the folds."""
    mean_average_precision: Mean | None
    """Mean over the folds, if an image can have several labels; otherwise None."""
    test: Mean | None
    """Mean over the models of the accuracy, or of the mean average precision, on the test split, if there is one."""

    @property
    def is_optimistic(self) -> bool:
        """Whether the evaluated images selected the weights."""
        return self.best_by != "last"


def summarize(runs: Sequence[tuple[Plan, RunRecord]]) -> CrossValidation:
    """Return the results over the runs of all folds, in order."""
    folds = [_facts_of(number, record) for number, (_, record) in enumerate(runs, 1)]
    plan, record = runs[0]
    correct, count = sum(fold.correct for fold in folds), sum(fold.count for fold in folds)
    low, high = wilson_interval(correct, count)
    precisions = [fold.mean_average_precision for fold in folds if fold.mean_average_precision is not None]
    tests = [_figure(record.test) for _, record in runs if record.test is not None]
    return CrossValidation(
        dataset=plan.splits.dataset_id,
        label_names=list(record.label_names),
        split_seed=plan.config.data.split_seed,
        best_by=str(plan.config.balance.best_by),
        folds=folds,
        correct=correct,
        count=count,
        accuracy=correct / count,
        low=low,
        high=high,
        mean_accuracy=mean_of([fold.top1 for fold in folds]),
        mean_average_precision=mean_of(precisions) if precisions else None,
        test=mean_of(tests) if tests else None,
    )


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of at least two values with its 95 % t interval."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Mean(mean=mean, low=mean - half, high=mean + half)


def write_folds(folder: Path, result: CrossValidation, runs: Sequence[tuple[Plan, RunRecord]]) -> None:
    """Write the predictions of all images, each by the model that was not trained on it, and then folds.json.

    Raises:
        OSError: If they cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    tables = []
    for fold, (plan, _) in enumerate(runs, 1):
        images = plan.splits.eval
        assert isinstance(images, IndexedImages)
        table = parquet.read_table(plan.folder.predictions)
        rows = images.indices[table["index"].to_numpy()]
        table = table.drop_columns("index").add_column(0, "row", pyarrow.array(rows))
        tables.append(table.add_column(1, "fold", pyarrow.array(np.full(len(rows), fold))))
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.concat_tables(tables).sort_by("row"), buffer)
    write_atomic(RunFolder(folder).predictions, buffer.getvalue())
    write_json(folder / "folds.json", dataclasses.asdict(result))


def _figure(facts: EvaluationFacts) -> float:
    return facts.top1 if facts.mean_average_precision is None else facts.mean_average_precision


def _facts_of(number: int, record: RunRecord) -> FoldFacts:
    facts, test = record.evaluation, record.test
    named: dict[str, Any] = {
        name: getattr(facts, name)
        for name in ("step", "correct", "count", "top1", "loss", "macro_recall", "mean_average_precision")
    }
    return FoldFacts(
        fold=number,
        **named,
        test=None if test is None else _figure(test),
        weights_sha256=record.model.weights_sha256,
    )
