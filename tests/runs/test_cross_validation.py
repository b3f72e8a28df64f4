"""`train --folds K` trains a run for each fold, resumes after an interruption, and summarizes them."""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from pyarrow import parquet
from pytest import TempPathFactory, approx, fixture, mark
from support import warm_start
from support.digit_pairs import write_pairs
from support.processes import ROOT, TINY, run_interpreter, run_process, write_images
from support.runs import lines, weights, without_clock

from resnext_hub import api
from resnext_hub.cards.model_card import wilson_interval
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

FOLDS = 3
FLAGS = (*TINY, "--image-size", 32, "--batch-size", 16, "--max-steps", 12, "--lr", 0.02, "--checkpoint-every", 4)


@fixture(scope="module")
def vehicles(tmp_path_factory: TempPathFactory) -> Path:
    """Images of three classes, of which one has fewer images than folds, and a test split."""
    root = tmp_path_factory.mktemp("folds-data") / "vehicles"
    for name, count, shade in (("bus", 20, 60), ("car", 17, 110), ("tram", 2, 160)):
        write_images(root / "train" / name, count, shade)
        write_images(root / "test" / name, 5, shade - 5)
    return root


@fixture(scope="module")
def whole(vehicles: Path, tmp_path_factory: TempPathFactory) -> tuple[Path, str, str]:
    """The folder of all folds, and what an uninterrupted command printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run_process("scripts/train.py", *FLAGS, "--dataset", vehicles, "--folds", FOLDS, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def records(folder: Path) -> list[RunRecord]:
    return [RunRecord.load(folder / f"fold-{fold}" / "record.json") for fold in range(1, FOLDS + 1)]


def test_folds_differ_only_in_their_split(whole: tuple[Path, str, str]) -> None:
    folder, _, _ = whole
    configs = [yaml.safe_load((folder / f"fold-{fold}" / "config.yaml").read_text()) for fold in range(1, FOLDS + 1)]
    assert [config.pop("fold") for config in configs] == [1, 2, 3]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["folds"] == FOLDS
    assert configs[0]["best_by"] == "last"
    found = records(folder)
    assert {record.evaluation.step for record in found} == {12}  # the last weights, whatever their accuracy
    for of_class in zip(*(record.dataset.eval_counts or [] for record in found), strict=True):
        assert max(of_class) - min(of_class) <= 1


def test_the_summary_has_the_results_of_all_images(whole: tuple[Path, str, str]) -> None:
    folder, out, err = whole
    content, found = json.loads((folder / "folds.json").read_text()), records(folder)
    assert content["format_version"] == 1
    assert [fold["correct"] for fold in content["folds"]] == [record.evaluation.correct for record in found]
    assert [fold["test"] for fold in content["folds"]] == [record.test.top1 for record in found if record.test]
    correct = sum(record.evaluation.correct for record in found)
    assert (content["correct"], content["count"]) == (correct, 39)
    assert (content["low"], content["high"]) == wilson_interval(correct, 39)
    values = [record.evaluation.top1 for record in found]
    mean = content["mean_accuracy"]
    half = 4.302653 * statistics.stdev(values) / 3**0.5  # t distribution with two degrees of freedom
    assert mean["mean"] == approx(statistics.mean(values))
    assert (mean["low"], mean["high"]) == approx((mean["mean"] - half, mean["mean"] + half))
    table = parquet.read_table(folder / "predictions.parquet").to_pydict()
    assert table["row"] == list(range(39))
    assert sum(map(int.__eq__, table["label"], table["prediction"])) == correct
    assert [table["fold"].count(fold) for fold in (1, 2, 3)] == [13, 13, 13]
    assert f"({correct}/39)\n" in out
    assert "the weights are those at the end of each run, and were not selected by any evaluation\n" in out
    assert "vehicles: classes with fewer than 3 images, the number of folds: tram (2); some folds have no eval" in err


def test_a_fold_is_an_ordinary_run_whose_card_says_so(whole: tuple[Path, str, str], command: Command) -> None:
    fold = whole[0] / "fold-2"
    code, out, err = command("evaluate", fold, "--threads", 1)
    assert code == 0, err
    assert out.count("the counts of every class match") == 2
    card = (fold / "model" / "README.md").read_text()
    assert "fold 2 of 3 of train, stratified, seed 0" in card
    assert "The weights are those at the end of the run; they were not selected by any evaluation." in card
    assert "optimistic" not in card


@mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_cross_validation_resumes_to_the_same_result(
    number: signal.Signals, whole: tuple[Path, str, str], vehicles: Path, tmp_path: Path
) -> None:
    flags = map(str, (*FLAGS, "--dataset", vehicles, "--folds", FOLDS, "--log-samples", "--output-dir", tmp_path))
    words = [sys.executable, "scripts/train.py", *flags]
    with warm_start.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline, samples = time.monotonic() + 120, tmp_path / "fold-2" / "samples-0.jsonl"
        while time.monotonic() < deadline and run.poll() is None:
            if samples.is_file() and samples.read_text().count("\n") >= 6:
                break
            time.sleep(0.005)
        assert run.poll() is None, "the runs ended before they could be interrupted"
        run.send_signal(number)
        assert run.wait() == (143 if number == signal.SIGTERM else -9)
    assert (tmp_path / "fold-1" / "record.json").is_file()
    assert not (tmp_path / "fold-3").exists()
    assert not (tmp_path / "folds.json").exists()
    first = (tmp_path / "fold-1" / "record.json").stat().st_mtime_ns
    done = run_process(*words[1:])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fold-1" / "record.json").stat().st_mtime_ns == first
    assert RunRecord.load(tmp_path / "fold-2" / "record.json").resumes == 1
    assert json.loads((tmp_path / "folds.json").read_text()) == json.loads((whole[0] / "folds.json").read_text())
    for fold in range(1, FOLDS + 1):
        expected, found = weights(whole[0] / f"fold-{fold}"), weights(tmp_path / f"fold-{fold}")
        assert all(expected[name].equal(found[name]) for name in expected)
        metrics = [lines(folder / f"fold-{fold}" / "metrics.jsonl") for folder in (whole[0], tmp_path)]
        assert without_clock(metrics[0]) == without_clock(metrics[1])
    again = run_process(*words[1:])
    assert again.stdout.startswith("all folds are already finished; nothing was trained\nfold 1: accuracy")


def test_folds_selected_by_accuracy_are_called_optimistic_and_one_can_be_trained_alone(
    vehicles: Path, tmp_path: Path, command: Command
) -> None:
    flags = (*FLAGS, "--dataset", vehicles, "--folds", 2, "--max-steps", 2, "--best-by", "top1")
    code, _, err = command("train", *flags, "--fold", 2, "--output-dir", tmp_path / "fold-2")
    assert code == 0, err
    assert not (tmp_path / "fold-1").exists()
    before = (tmp_path / "fold-2" / "record.json").read_bytes()
    code, out, err = command("train", *flags, "--output-dir", tmp_path)
    assert code == 0, err
    assert (tmp_path / "fold-2" / "record.json").read_bytes() == before
    assert (
        "the evaluated images were also used to select the weights, so these figures are optimistic (see --best-by "
        "last)" in out
    )
    code, _, err = command("train", *flags, "--folds", 3, "--output-dir", tmp_path)
    assert code == 2
    assert "--folds was 2 and is now 3" in err


def test_several_labels_have_a_mean_average_precision(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", {"train": 120})
    settings = dict(model="test_resnet", mixed_precision="no", threads="1", dataset=str(pairs), image_size=32)
    result = api.cross_validate(folds=2, **settings, max_steps=3, batch_size=16, output_dir=tmp_path / "folds")
    values = [fold.mean_average_precision for fold in result.folds]
    assert result.mean_average_precision is not None
    assert result.mean_average_precision.mean == approx(statistics.mean(filter(None, values)))
    assert result.count == 120
    assert len(parquet.read_table(tmp_path / "folds" / "predictions.parquet")) == 120


def test_other_uses_of_the_folder_and_of_the_hub_are_refused(vehicles: Path, tmp_path: Path, command: Command) -> None:
    flags = ("train", *FLAGS, "--dataset", vehicles, "--output-dir", tmp_path / "run")
    assert command(*flags, "--max-steps", 1)[0] == 0
    code, _, err = command(*flags, "--folds", 2)
    assert code == 2
    assert "contains a run; choose another --output-dir for the fold folders" in err
    for more in (("--push-to-hub", "--repo-id", "me/x", "--license", "mit"), ("--resume-from", "hub:me/x")):
        code, _, err = command(*flags[:-1], tmp_path / "other", "--folds", 2, *more)
        assert code == 2
        assert more[0] in err
    code, _, err = command(*flags[:-1], tmp_path / "other", "--folds", 2, "--early-stopping", 2, "--best-by", "last")
    assert code == 2
    assert "--early-stopping 2 needs a metric, but --best-by last uses none" in err
    code, out, err = command(*flags[:-1], tmp_path / "other", "--folds", 2, "--dry-run")
    assert code == 0, err
    assert out.endswith("this is the first of 2 such runs\ndry run: nothing was written\n")
    assert not (tmp_path / "other").exists()


@mark.slow
def test_two_processes_train_the_folds_of_one(whole: tuple[Path, str, str], vehicles: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", "localhost:0", "scripts/train.py", *FLAGS, "--dataset", vehicles, "--folds", FOLDS]
    done = run_interpreter(*words, "--output-dir", tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean of 3 folds") == 1
    for one, two in zip(records(whole[0]), records(tmp_path), strict=True):
        assert two.processes == 2
        assert one.dataset.fingerprint == two.dataset.fingerprint
