"""`resnext-hub check RUN` finds labels that were flipped, and its numbers are those of confident learning."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flipped_labels import flip, recall_at_k, write_idx
from PIL import Image
from pytest import approx, fixture, mark, raises
from sklearn.datasets import load_digits
from support.processes import TINY, run_process
from tqdm import tqdm

from resnext_hub.check.confident import TOP, Probabilities, find_wrong_labels
from resnext_hub.check.labels import _predict, check_labels
from resnext_hub.data.config import DataConfig
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import load
from resnext_hub.record import RunRecord
from resnext_hub.training.feed import evaluation_samples

Command = Callable[..., tuple[int, str, str]]

RECIPE = (
    *TINY, "--image-size", "32", "--crop-pct", "1", "--interpolation", "bilinear", "--scale", "0.7", "1",
    "--hflip", "0", "--optimizer", "adamw", "--lr", "0.005", "--weight-decay", "0.05", "--batch-size", "48",
    "--max-steps", "120", "--eval-every", "100",
)  # fmt: skip


@fixture(scope="module")
def flipped() -> np.ndarray:
    """Whether the label of each digit is flipped in the dataset of the run: one in ten."""
    labels = load_digits().target
    return flip(labels, 0.1, 10, seed=0) != labels


@fixture(scope="module")
def noisy_run(tmp_path_factory: object) -> Path:
    """A run on the digits with flipped labels, in `digits` beside it; a fifth is held out."""
    root = tmp_path_factory.mktemp("noisy")
    digits = load_digits()
    (root / "digits").mkdir()
    write_idx(root / "digits/train-images-idx3-ubyte", digits.images * 15)
    write_idx(root / "digits/train-labels-idx1-ubyte", flip(digits.target, 0.1, 10, seed=0))
    done = run_process("scripts/train.py", *RECIPE, "--dataset", root / "digits", "--output-dir", root / "run")
    assert done.returncode == 0, done.stderr
    return root / "run"


def predicted(rows: list[list[float]], labels: list[int]) -> Probabilities:
    return Probabilities.of_batch(torch.tensor(rows, dtype=torch.float64), torch.tensor(labels))


def test_the_estimate_of_a_case_computed_by_hand() -> None:
    # The thresholds are (0.9 + 0.8 + 0.1 + 0.55) / 4 = 0.5875 and (0.7 + 0.9 + 0.2) / 3 = 0.6. The fourth image is
    # confidently of no class. So 1 of 3 confident images with label 0 and 1 of 3 with label 1 are of the other class:
    # the estimate is 4 * 1/3 + 3 * 1/3 = 7/3.
    rows = [[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.55, 0.45], [0.3, 0.7], [0.1, 0.9], [0.8, 0.2]]
    labels = [0, 0, 0, 0, 1, 1, 1]
    flagged = find_wrong_labels(np.array(labels), predicted(rows, labels), 2)
    assert flagged.estimate == approx(7 / 3)
    assert flagged.images.tolist() == [2, 6]  # the least probable label first
    assert flagged.suggested.tolist() == [1, 0]
    assert flagged.probabilities.tolist() == approx([0.9, 0.8])


def test_the_most_probable_class_above_its_threshold_counts() -> None:
    # The thresholds are 0.35, 0.9 and 0.4. The first image is below that of class 1, its most probable one, and above
    # that of class 0, its label, so it is not counted as wrong.
    rows = [[0.4, 0.5, 0.1], [0.3, 0.3, 0.4], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4]]
    labels = [0, 0, 1, 2]
    flagged = find_wrong_labels(np.array(labels), predicted(rows, labels), 3)
    assert flagged.estimate == approx(2 * 1 / 2)
    assert flagged.images.tolist() == [1]


def test_unreadable_images_and_classes_without_images_do_not_count() -> None:
    rows = [[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [torch.nan] * 3, [0.1, 0.9, 0.0]]
    labels = [0, 0, 1, 1]
    flagged = find_wrong_labels(np.array(labels), predicted(rows, labels), 3)
    assert flagged.estimate == 0
    assert len(flagged.images) == 0


def test_memory_does_not_grow_with_the_number_of_classes() -> None:
    found = predicted([[1 / 1000] * 1000], [500])
    assert found.values.shape == found.classes.shape == (1, TOP)
    assert found.classes.tolist() == [list(range(TOP))]
    assert found.own.tolist() == approx([0.001])


def test_most_flipped_labels_are_found_and_few_others(noisy_run: Path, flipped: np.ndarray, command: Command) -> None:
    code, out, _ = command("check", noisy_run, "--json")
    findings = json.loads(out)
    assert code == 0
    train, held_out = findings["splits"]
    assert [train["split"], train["images"], train["trained_on"]] == ["train", 1437, True]
    assert [held_out["split"], held_out["images"], held_out["trained_on"]] == ["held out", 360, False]
    estimate = train["estimated_wrong_labels"] + held_out["estimated_wrong_labels"]
    assert 0.6 < estimate / flipped.sum() < 1.4
    splits = load_splits(DataConfig(dataset=str(noisy_run.parent / "digits")))
    trained_on = np.isin(np.arange(len(flipped)), splits.train.indices)
    assert recall_at_k(findings, flipped & trained_on) >= 0.7
    rows = [found["row"] for found in findings["wrong_labels"]]
    assert flipped[rows].mean() >= 0.9
    truth = load_digits().target
    suggested = [int(found["suggested"]) for found in findings["wrong_labels"]]
    assert (truth[rows] == suggested).mean() >= 0.9
    probabilities = [found["label_probability"] for found in findings["wrong_labels"]]
    assert probabilities == sorted(probabilities)


def test_the_probabilities_are_those_of_the_evaluation(noisy_run: Path) -> None:
    splits = load_splits(DataConfig(dataset=str(noisy_run.parent / "digits")))
    record = RunRecord.load(noisy_run / "record.json")
    classifier = load(noisy_run)
    samples = evaluation_samples(splits.eval, classifier.input)
    with tqdm(disable=True) as bar:
        found, unreadable = _predict(
            classifier.model, samples, record.evaluation.batch_size, torch.device("cpu"), "none", 0, bar
        )
    assert not unreadable
    assert int((found.classes[:, 0] == splits.eval.labels).sum()) == record.evaluation.correct
    assert float(-np.log(found.own.astype(np.float64)).mean()) == approx(record.evaluation.loss, rel=1e-5)


def test_the_text_lists_splits_pairs_and_images(noisy_run: Path, command: Command) -> None:
    code, out, _ = command("check", noisy_run)
    findings = json.loads(command("check", noisy_run, "--json")[1])
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["split", "images", "flagged", "wrong", "labels", "(estimate)"]
    assert lines[1].startswith("train (trained on)  ")
    assert lines[2].startswith("held out  ")
    first = findings["wrong_labels"][0]
    title = f"labels that are probably wrong, the least probable first: {len(findings['wrong_labels'])}"
    assert lines[lines.index(title) + 1] == (
        f"  {first['split']}: {first['name']}: labeled {first['label']}, probably {first['suggested']} "
        f"({first['probability']:.2f})"
    )


def test_workers_find_the_same(noisy_run: Path) -> None:
    alone, together = (check_labels(noisy_run, workers) for workers in (0, 2))
    assert [(found.row, found.probability) for found in alone.wrong] == [
        (found.row, found.probability) for found in together.wrong
    ]


def test_training_leaves_out_the_images_of_the_training_split(
    noisy_run: Path, flipped: np.ndarray, tmp_path: Path, command: Command
) -> None:
    written = tmp_path / "exclude.txt"
    _, out, _ = command("check", noisy_run, "--json", "--write-exclude", written)
    flagged = [found for found in json.loads(out)["wrong_labels"] if found["trained_on"]]
    _, *lines = map(json.loads, written.read_text().splitlines())
    assert [line[:3] for line in lines] == [["train", found["row"], found["name"]] for found in flagged]
    first = flagged[0]
    assert lines[0][3] == f"labeled {first['label']}, probably {first['suggested']} ({first['probability']:.2f})"
    digits = noisy_run.parent / "digits"
    words = [*TINY, "--dataset", digits, "--image-size", 32, "--max-steps", 1, "--exclude", written]
    code, _, err = command("train", *words, "--output-dir", tmp_path / "run")
    assert code == 0, err
    dataset = RunRecord.load(tmp_path / "run/record.json").dataset
    assert (dataset.train_count, dataset.eval_count) == (1437 - len(flagged), 360)
    code, _, err = command("check", tmp_path / "run", "--write-exclude", written)
    assert code == 0, err
    assert written.read_text().splitlines()[1 : 1 + len(flagged)] == list(map(json.dumps, lines))  # they stay left out


def test_the_grid_shows_images(noisy_run: Path, tmp_path: Path, command: Command) -> None:
    code, _, err = command("check", noisy_run, "--grid", tmp_path / "grid.png")
    assert code == 0, err
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert min(grid.shape[:2]) > 1000
    assert grid.std() > 20


def test_unreadable_images_are_listed(vehicles_run: Path, command: Command) -> None:
    code, out, err = command("check", vehicles_run)
    assert code == 1
    assert err.endswith("error: 1 unreadable image found\n")
    assert "unreadable: 1\n  validation: car/005-broken.png: not an image\n" in out


def test_a_dataset_that_has_changed_is_refused(noisy_run: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(noisy_run.parent / "digits", tmp_path / "digits")
    run = shutil.copytree(noisy_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(noisy_run.parent / "digits"), str(tmp_path / "digits")))
    write_idx(tmp_path / "digits/train-labels-idx1-ubyte", load_digits().target)
    code, out, err = command("check", run)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'digits'} has changed since the run: its fingerprint is " in err


def test_a_stream_is_refused(noisy_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(noisy_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("streaming: false", "streaming: true"))
    with raises(RequestError, match=r"was trained with streaming=True, but a stream cannot be checked"):
        check_labels(run)


@mark.parametrize("words", [("--layout", "idx"), ("--eval-fraction", "0.5"), ("--exclude", "list.txt")])
def test_settings_of_a_dataset_are_refused(words: tuple[str, str], noisy_run: Path, command: Command) -> None:
    code, _, err = command("check", noisy_run, *words)
    assert code == 2
    assert err == f"error: {words[0]} cannot be combined with a run: {noisy_run} has its own settings; omit this flag\n"


def test_a_folder_without_a_record_is_a_dataset(noisy_run: Path, command: Command) -> None:
    code, out, _ = command("check", noisy_run.parent / "digits")
    assert code in (0, 1)
    assert out.startswith("class  train  held out\n")
