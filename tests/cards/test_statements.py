"""What a card states is read back as it was written, whatever the classes are called."""

import dataclasses
from pathlib import Path

from pytest import mark
from support.records import a_record

from resnext_hub.cards.model_card import MOST_CLASSES, class_rows, render_card
from resnext_hub.cards.statements import class_cells, config_facts, read_statements
from resnext_hub.facts import LabelFacts
from resnext_hub.record import RunRecord

NAMES = ('Müller\'s | "bus"', "a\\|b \\", "**x** (3/4)", "| split |", "class", "\u202eevil\x1b", "- : 1e5", "x" * 200)
"""Names that Markdown, YAML or a terminal could misunderstand."""

CONFIG = {
    "architecture": "test_resnet",
    "label_names": list(NAMES),
    "pretrained_cfg": {"mean": [0.1, 1e-05, 1.0], "crop_pct": 0.875, "license": "no", "first_conv": "conv1.0"},
    "resnext_hub": {"variant": None, "tta": "flip", "thresholds": [0.1] * 99},
}


def read(record: RunRecord, tmp_path: Path) -> tuple:
    (tmp_path / "README.md").write_text(render_card(record, config=CONFIG))
    found = read_statements(tmp_path / "README.md")
    facts = record.reported
    expected = class_cells(class_rows(record.label_names, facts.confusion, facts.labels)[:MOST_CLASSES])
    return found, expected


@mark.parametrize("names", [NAMES, tuple(f"{name} {i}" for i in range(9) for name in NAMES)], ids=["few", "many"])
def test_the_table_of_classes_and_all_results_are_read_as_they_were_written(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    confusion = [[(label, 3 + label % 5), ((label + 1) % len(names), 1 + label % 3)] for label in range(len(names))]
    record = a_record(names, confusion)
    dataset = dataclasses.replace(record.dataset, test_count=record.evaluation.count)
    record = dataclasses.replace(record, test=record.evaluation, dataset=dataset)
    found, expected = read(record, tmp_path)
    assert found.rows == expected
    assert len(found.rows) == min(len(names), MOST_CLASSES)
    assert not found.edited
    assert found.facts.config == config_facts(CONFIG)
    result = (str(record.evaluation.correct), str(record.evaluation.count))
    assert [claim[1:] for claim in found.claims] == [result] * 3
    assert found.accuracies == [record.evaluation.top1] * 2
    assert found.facts.results.keys() == {"evaluation", "test"}


def test_the_table_of_labels_is_read_as_it_was_written(tmp_path: Path) -> None:
    labels = [
        LabelFacts(positives=9, predicted=5 + i, true_positives=4, average_precision=0.1 * i, threshold=0.5)
        for i in range(len(NAMES))
    ]
    record = a_record(NAMES, [[(label, 2)] for label in range(len(NAMES))])
    evaluation = dataclasses.replace(
        record.evaluation,
        confusion=[],
        labels=labels,
        mean_average_precision=0.4,
        macro_recall=0.5,
        correct=7,
        top1=7 / 16,
    )
    found, expected = read(dataclasses.replace(record, evaluation=evaluation), tmp_path)
    assert found.rows == expected
    assert found.rows[1][1:] == ("9", "10.00 %", "66.67 %", "44.44 %")
    assert [claim[1:] for claim in found.claims] == [("7", "16")]
    assert found.accuracies == [7 / 16]
