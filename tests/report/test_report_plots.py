"""The plots of a report: for any number of classes, in both themes, and with figures that can be checked."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from PIL import Image
from pytest import LogCaptureFixture, approx, fixture, mark
from sklearn.metrics import precision_recall_fscore_support
from support.records import a_record

from resnext_hub.facts import EvaluationFacts, LabelFacts
from resnext_hub.plots.clusters import clustered_order
from resnext_hub.plots.lettering import choose_lettering
from resnext_hub.plots.per_class import class_results
from resnext_hub.plots.reliability import Confidences
from resnext_hub.plots.theme import THEMES, Theme
from resnext_hub.plots.write import save_plot
from resnext_hub.record import RunRecord
from resnext_hub.report import galleries, sections
from resnext_hub.report.outputs import Outputs, TrainingBatch
from resnext_hub.report.sections import Section
from resnext_hub.report.stored import Predictions
from resnext_hub.training.temperature import certainties, cross_fitted, fit_temperature

HISTORY = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "lr": 0.1, "images_per_second": 80.0},
    {"step": 2, "epoch": 1.0, "loss": 1.5, "lr": 0.05, "images_per_second": 90.0},
    {"step": 2, "epoch": 1.0, "eval_loss": 1.0, "eval_top1": 0.5, "eval_map": 0.4},
]


def record_of(classes: int, seed: int = 0) -> RunRecord:
    """Return a record whose classes are mostly right and else confused with one of three neighbors."""
    generator = np.random.default_rng(seed)
    rows = []
    for label in range(classes):
        others = {(label + int(n)) % classes for n in generator.integers(1, 4, 3)} - {label}
        rows.append([(label, 12), *((other, int(generator.integers(1, 5))) for other in sorted(others))])
    return a_record([f"class {index}" for index in range(classes)], rows, history=HISTORY)


def with_several_labels(labels: int) -> RunRecord:
    record = record_of(labels)
    facts = [
        LabelFacts(positives=20, predicted=18, true_positives=i % 18, average_precision=0.5, threshold=0.4)
        for i in range(labels)
    ]
    values = dataclasses.asdict(record.evaluation) | {
        "labels": facts,
        "confusion": [],
        "mean_average_precision": 0.5,
        "correct": record.evaluation.count // 2,
        "top1": record.evaluation.count // 2 / record.evaluation.count,
    }
    return dataclasses.replace(record, evaluation=EvaluationFacts(**values))


def outputs_of(record: RunRecord, count: int = 60) -> Outputs:
    generator, classes = np.random.default_rng(0), len(record.label_names)
    labels = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes)) + 4 * np.eye(classes)[labels]
    if record.evaluation.is_multi_label:
        labels = logits + generator.normal(size=logits.shape) > 1
    embeddings = logits @ generator.normal(size=(classes, 16))
    return Outputs(labels=labels, logits=logits, embeddings=embeddings.astype(np.float32))


RECORDS = {
    "2": record_of(2),
    "10": record_of(10),
    "20": record_of(20),
    "320": record_of(320),
    "1000": record_of(1000),
    "several labels": with_several_labels(12),
    "320 labels": with_several_labels(320),
}


@fixture(params=THEMES, ids=lambda theme: theme.name)
def theme(request: object) -> Theme:
    return request.param


def draw_all(part: Section, names: list[str], theme: Theme, folder: Path) -> list[Path]:
    letters, files = choose_lettering(tuple(names)), []
    assert letters
    for plot in part.plots:
        files.append(folder / f"{plot.name}-{theme.name}.png")
        assert save_plot(files[-1], tuple(names), lambda fonts, plot=plot: plot.draw(fonts, theme), theme, 100)
        assert plot.alt.endswith(".")
    return files


@mark.parametrize("kind", RECORDS)
def test_every_plot_is_drawn_for_any_number_of_classes(
    kind: str, theme: Theme, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    record = RECORDS[kind]
    outputs = outputs_of(record)
    parts = [
        sections.curves(record),
        sections.confusion(record),
        sections.classes(record),
        sections.reliability(record, "not read", outputs),
        sections.embeddings(record, outputs),
        galleries.training_batch(batch_of(record), record.label_names, mixes=True),
    ]
    with caplog.at_level(logging.WARNING, "resnext_hub"):
        files = [file for part in parts for file in draw_all(part, record.label_names, theme, tmp_path)]
    assert caplog.records == []
    several = record.evaluation.is_multi_label
    expected = {"curves", "classes", "reliability", "embeddings", "batch"}
    expected |= {"average_precision"} if several else {"confusion"}
    expected |= {"confusions"} if kind in ("320", "1000") else set()
    assert {file.stem.removesuffix(f"-{theme.name}") for file in files} == expected
    for file in files:
        with Image.open(file) as image:
            assert image.width <= 660  # 100 pixels per inch: shown at 600, no text is smaller than 9 pixels
            corner = image.convert("RGB").getpixel((0, 0))
        assert sum(corner) > 700 if theme.name == "light" else sum(corner) < 100
    if several:
        assert "not shown: an image can have several labels" in parts[1].missing[0]


def batch_of(record: RunRecord) -> TrainingBatch:
    generator = np.random.default_rng(0)
    targets = np.zeros((16, len(record.label_names)))
    targets[:, 0] = 0.7
    targets[:8, 1] = 0.3
    return TrainingBatch(pixels=generator.integers(0, 256, (16, 24, 24, 1), dtype=np.uint8), targets=targets)


def test_classes_that_are_confused_with_each_other_stand_together() -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 5))
    fractions = np.eye(300) * 0.6 + (groups[:, None] == groups) * 0.08
    ordered = groups[clustered_order(fractions)]
    assert (np.diff(ordered) != 0).sum() == 59
    assert clustered_order(np.eye(4)).tolist() == [0, 1, 2, 3]


def test_recall_and_precision_are_those_of_scikit_learn() -> None:
    record = RECORDS["10"]
    pairs = [(t, p) for t, row in enumerate(record.reported.confusion) for p, n in row for _ in range(n)]
    precision, recall, _, count = precision_recall_fscore_support(*zip(*pairs, strict=True))
    results = class_results(record)
    assert [r.recall for r in results] == sorted(r.recall for r in results)
    for result in results:
        assert result.recall == approx(recall[result.label])
        assert result.precision == approx(precision[result.label])
        assert result.count == count[result.label]


def test_a_temperature_that_was_applied_is_found_again_and_never_fitted_on_the_images_it_is_used_for() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 5)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([generator.choice(5, p=row) for row in probabilities])
    assert fit_temperature(3 * logits, labels) == approx(3, rel=0.1)
    errors = [
        Confidences(title="", probabilities=found, right=right).error
        for found, right in (certainties(3 * logits, labels), certainties(cross_fitted(3 * logits, labels), labels))
    ]
    assert errors[0] > 0.15
    assert errors[1] < 0.04
    # a changed label changes only the logits of the other folds
    changed = labels.copy()
    changed[7] = (changed[7] + 1) % 5
    same = (cross_fitted(logits, labels) == cross_fitted(logits, changed)).all(axis=1)
    assert same.sum() == 800
    assert same[7]


def test_a_temperature_for_several_labels_is_found_again() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2000, 4)) * 2
    labels = generator.random(logits.shape) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(0.5 * logits, labels) == approx(0.5, rel=0.1)
    found, right = certainties(logits, labels)
    assert found.shape == right.shape == (8000,)


def test_few_images_get_no_temperature_and_no_embedding() -> None:
    few = outputs_of(RECORDS["2"], count=8)
    stored = Predictions(
        indices=np.arange(4), labels=np.zeros(4, int), predictions=np.arange(4) % 2, probabilities=np.full(4, 0.6)
    )
    part = sections.reliability(RECORDS["2"], stored, few)
    assert len(part.plots) == 1
    assert "8 images are too few to fit a temperature" in part.missing[0]
    assert sections.embeddings(RECORDS["2"], few).missing == ("Embeddings are not shown: 8 images are too few.",)


def test_mistakes_and_hits_are_in_the_order_of_confidence() -> None:
    stored = Predictions(
        indices=np.arange(5),
        labels=np.array([0, 1, 1, 0, 1]),
        predictions=np.array([0, 0, 1, 1, 1]),
        probabilities=np.array([0.9, 0.6, 0.7, 0.8, 0.55]),
    )
    assert stored.confident_mistakes.tolist() == [3, 1]
    assert stored.doubtful_hits.tolist() == [4, 2, 0]
    several = Predictions(
        indices=np.arange(3),
        labels=np.array([[True, False]] * 3),
        predictions=np.array([[True, False], [True, True], [False, True]]),
        probabilities=np.array([[0.9, 0.1], [0.8, 0.7], [0.1, 0.95]]),
    )
    assert several.confident_mistakes.tolist() == [2, 1]
    assert several.doubtful_hits.tolist() == [0]
