"""Write the tables of a run, in Parquet: its predictions, and its confusion matrices."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from resnext_hub.files import write_atomic
from resnext_hub.record import RunRecord
from resnext_hub.training.evaluation import AnyEvaluation
from resnext_hub.training.multi_label import MultiLabelEvaluation


def write_predictions(evaluation: AnyEvaluation, path: Path) -> None:
    """Write a row for each readable image; with several labels, label and prediction are lists."""
    columns: dict[str, Any] = {
        "index": evaluation.indices,
        "label": evaluation.labels,
        "prediction": evaluation.predictions,
        "probability": evaluation.probabilities,
    }
    if isinstance(evaluation, MultiLabelEvaluation):
        columns |= {name: [np.flatnonzero(row) for row in columns[name]] for name in ("label", "prediction")}
        columns["probability"] = list(evaluation.probabilities.astype(np.float32))
    _write_parquet(columns, path)


def write_confusion(record: RunRecord, path: Path) -> None:
    """Write a row for each pair of a class and a prediction that occurs, the most frequent first in each split."""
    names = np.array(record.label_names)
    parts = []
    for split, facts in (("evaluation", record.evaluation), ("test", record.test)):
        cells = [(label, *cell) for label, row in enumerate(facts.confusion) for cell in row] if facts else []
        label, prediction, count = np.array(cells, dtype=np.int64).reshape(-1, 3).T
        order = np.argsort(-count, kind="stable")
        parts.append((np.full(len(cells), split), label[order], prediction[order], count[order]))
    columns = dict(
        zip(("split", "label", "prediction", "count"), map(np.concatenate, zip(*parts, strict=True)), strict=True)
    )
    named = {f"{column}_name": names[columns[column]] for column in ("label", "prediction")}
    _write_parquet(columns | named, path)


def _write_parquet(columns: dict[str, Any], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    write_atomic(path, buffer.getvalue())
