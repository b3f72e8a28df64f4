"""Results that grow with the classes are stored by what occurs, not by what could occur."""

import dataclasses
from pathlib import Path

from pyarrow import parquet
from support.records import a_record

from resnext_hub.runs.tables import write_confusion


def test_the_confusion_table_has_a_row_for_each_pair_that_occurs(tmp_path: Path) -> None:
    record = a_record()
    test = dataclasses.replace(record.evaluation, correct=5, count=5, top1=1.0, confusion=[[(0, 1)], [], [(2, 4)]])
    tested = dataclasses.replace(record.dataset, test_count=5)
    write_confusion(dataclasses.replace(record, test=test, dataset=tested), tmp_path / "confusion.parquet")
    rows = parquet.read_table(tmp_path / "confusion.parquet").to_pylist()
    assert [(row["split"], row["label"], row["prediction"], row["count"]) for row in rows] == [
        ("evaluation", 1, 1, 4),
        ("evaluation", 2, 2, 4),
        ("evaluation", 0, 0, 3),
        ("evaluation", 0, 1, 1),
        ("test", 2, 2, 4),
        ("test", 0, 0, 1),
    ]
    assert (rows[3]["label_name"], rows[3]["prediction_name"]) == ("bus", "car")


def test_the_confusion_table_grows_with_classes_and_not_with_classes_squared(tmp_path: Path) -> None:
    sizes = []
    for classes in (500, 1000):
        rows = [[(n, 2), ((n + 1) % classes, 1)] for n in range(classes)]
        write_confusion(a_record([f"class {n}" for n in range(classes)], rows), tmp_path / "confusion.parquet")
        assert parquet.read_metadata(tmp_path / "confusion.parquet").num_rows == 2 * classes
        sizes.append((tmp_path / "confusion.parquet").stat().st_size)
    assert sizes[1] < 2.1 * sizes[0]
