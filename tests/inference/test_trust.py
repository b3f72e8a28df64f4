"""`predict` tells which answers are unsure, and which images are unlike those of training, in every format."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow import parquet
from pytest import approx, fixture, mark, raises
from support.processes import TINY, run_process

import resnext_hub
from resnext_hub.data.sources import load_digits_table
from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import load

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model that can tell digits."""
    folder = tmp_path_factory.mktemp("trust") / "run"
    flags = (*TINY, "--image-size", 32, "--epochs", 3, "--batch-size", 64, "--lr", 0.01, "--test-fraction", 0.2)
    done = run_process("scripts/train.py", *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty digits, twenty mixtures of two digits, and an image of noise."""
    folder = tmp_path_factory.mktemp("images")
    rows = load_digits_table()["image"][:60]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(entry["bytes"]))) for entry in rows]).astype(np.float64)
    mixed = (pixels[20:40] + pixels[40:60]) / 2
    for index, values in enumerate(np.concatenate([pixels[:20], mixed])):
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{index:02}.png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    return folder


def test_answers_below_the_fitted_probability_are_unsure(run: Path, images: Path) -> None:
    classifier, files = load(run), sorted(images.iterdir())
    precision = max(classifier.accept)
    found = resnext_hub.predict(classifier, files, accept_precision=precision)
    expected = [prediction.guesses[0].probability < classifier.accept[precision] for prediction in found]
    assert [prediction.unsure for prediction in found] == expected
    assert {True, False} == set(expected)
    assert all(prediction.unsure is None for prediction in classifier.predict(files))
    # unsure by its most probable class, whatever is listed
    listed = classifier.predict(files, accept_precision=precision, threshold=0.99)
    assert [prediction.unsure for prediction in listed] == expected


def test_a_precision_between_two_fitted_ones_takes_the_higher_one(run: Path, images: Path) -> None:
    classifier, files = load(run), sorted(images.iterdir())
    highest = max(classifier.accept)
    between, higher = (classifier.predict(files, accept_precision=value) for value in (highest - 0.001, highest))
    assert [prediction.unsure for prediction in between] == [prediction.unsure for prediction in higher]


def test_every_format_states_unsure_answers_and_scores(
    run: Path, images: Path, tmp_path: Path, command: Command
) -> None:
    files, classifier = sorted(images.iterdir()), load(run)
    precision = max(classifier.accept)
    expected = classifier.predict(files, accept_precision=precision)
    flags = ("--accept-precision", precision, "--threads", 1)
    _, out, _ = command("predict", run, images, *flags)
    assert [line.endswith("\tunsure") for line in out.splitlines()] == [found.unsure for found in expected]
    _, out, _ = command("predict", run, images, *flags, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["unsure"] for line in found] == [prediction.unsure for prediction in expected]
    scores = [prediction.ood_score for prediction in expected]
    assert [line["ood_score"] for line in found] == approx(scores, abs=1e-3)
    assert found[-1]["path"].endswith("noise.png")
    assert found[-1]["ood_score"] > 0
    _, out, _ = command("predict", run, images, *flags, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["unsure"] == "true" for row in rows] == [prediction.unsure for prediction in expected]
    assert [float(row["ood_score"]) for row in rows] == approx(scores, abs=1e-3)
    command("predict", run, images, *flags, "--parquet", tmp_path / "found.parquet")
    table = parquet.read_table(tmp_path / "found.parquet").to_pydict()
    assert table["unsure"] == [prediction.unsure for prediction in expected]
    assert table["ood_score"] == approx(scores, abs=1e-3)


def test_the_probabilities_are_the_same_with_and_without_the_score(run: Path, images: Path) -> None:
    classifier, files = load(run), sorted(images.iterdir())
    plain = dataclasses.replace(classifier, ood=None)
    for tta in ("none", "flip"):
        with_score, without = (
            dataclasses.replace(which, tta=tta).predict(files, top=10) for which in (classifier, plain)
        )
        assert [found.guesses for found in with_score] == [found.guesses for found in without]
        assert all(found.ood_score is None for found in without)


@mark.parametrize(
    ("precision", "reason"),
    [
        (0, "expected a number between 0 and 1"),
        (1.5, "expected a number between 0 and 1"),
        (True, "expected a number between 0 and 1"),
        (0.9999, r"expected at most 0\.\d+, the highest precision for which a threshold was"),
    ],
)
def test_a_precision_that_cannot_be_met_is_refused(precision: float, reason: str, run: Path) -> None:
    with raises(RequestError, match=reason):
        load(run).predict(np.zeros((8, 8), np.uint8), accept_precision=precision)


def test_a_model_whose_probabilities_were_changed_or_never_fitted_accepts_nothing(run: Path) -> None:
    image, classifier = np.zeros((8, 8), np.uint8), load(run)
    for changed in (dataclasses.replace(classifier, temperature=2.0), dataclasses.replace(classifier, tta="flip")):
        with raises(RequestError, match="needs a temperature of 1 and"):
            changed.predict(image, accept_precision=0.9)
    with raises(RequestError, match="has no thresholds for accepting answers"):
        dataclasses.replace(classifier, accept={}).predict(image, accept_precision=0.9)
    with raises(RequestError, match="needs exactly one class per image"):
        dataclasses.replace(classifier, thresholds=(0.5,) * 10).predict(image, accept_precision=0.9)
