"""A test split is evaluated once, at the end of a run, with the weights that the evaluation split chose."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import yaml
from PIL import Image
from pytest import MonkeyPatch, TempPathFactory, fixture
from support.processes import TINY, run_process, write_images
from support.runs import lines

from resnext_hub import api
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

COUNTS = {"train": 20, "val": 8, "test": 12}
SHADES = (("bus", 60, 0), ("car", 110, 0), ("tram", 160, 0))


@fixture(scope="module")
def vehicles(tmp_path_factory: TempPathFactory) -> Path:
    """Images in three splits; one test image is unreadable."""
    root = tmp_path_factory.mktemp("three-splits") / "vehicles"
    for number, (split, count) in enumerate(COUNTS.items()):
        for name, shade, _ in SHADES:
            write_images(root / split / name, count, shade - 9 * number)
    (root / "test" / "car" / "005.png").write_bytes(b"no image")
    return root


@fixture(scope="module")
def run(vehicles: Path, tmp_path_factory: TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vehicles-run"
    flags = (*TINY, "--dataset", vehicles, "--image-size", 32, "--max-steps", 20, "--lr", 0.02, "--batch-size", 16)
    done = run_process("scripts/train.py", *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    return folder


def test_validation_chooses_the_weights_and_the_test_is_not_evaluated_during_training(run: Path) -> None:
    record = RunRecord.load(run / "record.json")
    evaluations = [line for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert len(evaluations) > 2
    assert {line["eval_count"] for line in evaluations} == {24}
    best = max(evaluations, key=lambda line: (line["eval_correct"], -line["eval_loss"]))
    assert record.test is not None
    assert record.evaluation.step == record.test.step == best["step"]
    assert record.evaluation.correct == best["eval_correct"]
    assert (record.evaluation.count, record.test.count, record.dataset.test_count) == (24, 35, 36)


def test_stock_timm_reproduces_the_test_accuracy(run: Path, vehicles: Path) -> None:
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    correct = 0
    for label, (name, _, _) in enumerate(SHADES):
        for path in sorted((vehicles / "test" / name).glob("*.png")):
            if path.read_bytes() != b"no image":
                with torch.inference_mode():
                    correct += int(model(transform(Image.open(path))[None]).argmax()) == label
    record = RunRecord.load(run / "record.json")
    assert record.test is not None
    assert correct == record.test.correct


def test_the_card_says_which_split_chose_the_weights_and_which_measured_them(run: Path) -> None:
    card, record = (run / "model" / "README.md").read_text(), RunRecord.load(run / "record.json")
    assert record.test is not None
    assert f"**accuracy {100 * record.test.top1:.2f} % ({record.test.correct}/35)** on test images" in card
    assert "chosen as the best of the run by accuracy on the evaluation images (split val)" in card
    assert "The test images (split test) were evaluated only once" in card
    assert "60 training images (split train), 24 evaluation images (split val), 36 test images (split test)" in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    results = {result["dataset"]["split"]: result["metrics"] for result in metadata["model-index"][0]["results"]}
    assert list(results) == ["test", "val"]
    for split, facts in (("test", record.test), ("val", record.evaluation)):
        values = {metric["name"]: metric["value"] for metric in results[split]}
        assert values["Top-1 accuracy"] == facts.top1
        assert values["Macro recall"] == facts.macro_recall


def test_both_splits_are_evaluated_again_and_compared(run: Path, command: Command) -> None:
    code, out, err = command("evaluate", run)
    assert code == 0, err
    assert out.count("the counts of every class match") == 2
    assert "test accuracy" in out
    record = RunRecord.load(run / "record.json")
    assert record.test is not None
    assert api.evaluate(run, split="test").correct == record.test.correct
    assert api.evaluate(run).correct == record.evaluation.correct


def test_the_unreadable_test_image_and_all_predictions_are_recorded(run: Path) -> None:
    record = RunRecord.load(run / "record.json")
    assert [(entry.split, entry.image) for entry in record.unreadable_images] == [("test", "car/005.png")]
    table = datasets.Dataset.from_parquet(str(run / "test-predictions.parquet"))
    assert len(table) == 35
    assert record.test is not None
    assert int((np.array(table["label"]) == np.array(table["prediction"])).sum()) == record.test.correct


def test_a_finished_run_of_a_version_without_tests_is_still_recognized(
    vehicles: Path, tmp_path: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(vehicles.parent)  # by a relative path, which the file has as an absolute one
    flags = ("train", *TINY, "--dataset", vehicles.name, "--image-size", 32, "--max-steps", 2, "--batch-size", 16)
    assert command(*flags, "--test-split", "none", "--output-dir", tmp_path / "run")[0] == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for name in (
        "test_split",
        "test_fraction",
        "group_duplicates",
        "class_weights",
        "sampling",
        "logit_adjustment",
        "best_by",
    ):
        del config[name]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    code, out, err = command(*flags, "--output-dir", tmp_path / "run")
    assert code == 0, err
    assert "is already finished" in out
    assert "unused splits: test" in err


def test_a_record_without_a_test_is_read_and_one_that_contradicts_itself_is_not(run: Path, tmp_path: Path) -> None:
    import pytest

    from resnext_hub.errors import RequestError

    content = json.loads((run / "record.json").read_text())
    older = {name: value for name, value in content.items() if name not in ("test", "class_weights")}
    older["evaluation"] = {k: v for k, v in content["evaluation"].items() if k != "macro_recall"}
    (tmp_path / "record.json").write_text(json.dumps(older))
    assert RunRecord.load(tmp_path / "record.json").reported == RunRecord.load(tmp_path / "record.json").evaluation
    content["test"]["correct"] += 1
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match="expected correct to be the diagonal of confusion"):
        RunRecord.load(tmp_path / "record.json")


def test_published_again_without_the_test_the_card_speaks_of_one_split(run: Path, tmp_path: Path) -> None:
    from resnext_hub.cards.model_card import render_card

    shutil.copy(run / "record.json", tmp_path / "record.json")
    content = json.loads((run / "record.json").read_text()) | {"test": None}
    (tmp_path / "record.json").write_text(json.dumps(content))
    card = render_card(RunRecord.load(tmp_path / "record.json"))
    assert "test images" not in card
    assert "were chosen as the best of the run by accuracy on this split, so the results are slightly" in card
