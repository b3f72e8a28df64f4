"""The recipe `auto` chooses by the number of images per class, says what it chose, and keeps it."""

from collections.abc import Callable
from pathlib import Path

import datasets
import timm
import yaml
from pytest import fixture, mark
from support.processes import save_with_timm, small_model, write_images
from support.runs import kill_at, weights

from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.auto import SETTINGS
from resnext_hub.runs.existing import read_config
from resnext_hub.runs.recipes import AUTO, RECIPES
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.training.plan import Plan

Command = Callable[..., tuple[int, str, str]]

FEW, MANY = RECIPES[AUTO].tiers


@fixture(scope="module")
def start(tmp_path_factory: object) -> Path:
    """Weights to start from, in timm's layout."""
    return save_with_timm(tmp_path_factory.mktemp("start") / "model", "test_resnet", 32)  # type: ignore[attr-defined]


@fixture(scope="module")
def photos(tmp_path_factory: object) -> Path:
    """Ten training images of each of two classes, and three for evaluation."""
    folder: Path = tmp_path_factory.mktemp("photos")  # type: ignore[attr-defined]
    for shade, name in ((60, "dark"), (180, "light")):
        write_images(folder / "train" / name, 10, shade)
        write_images(folder / "val" / name, 3, shade + 5)
    return folder


def plan_of(start: Path, tmp_path: Path, recipe: str | None = None, **asked: object) -> Plan:
    asked = {"model": f"local-dir:{start}", "mixed_precision": "no", **asked}
    settings, name = merge_settings(asked, recipe)
    return prepare(settings, asked=asked, recipe=name, output_dir=tmp_path / "run")


@mark.parametrize(("count", "tier"), [(100, FEW), (101, MANY)])
def test_the_number_of_images_per_class_decides(start: Path, tmp_path: Path, count: int, tier: object) -> None:
    for shade, name in ((60, "dark"), (180, "light")):
        write_images(tmp_path / "data" / "train" / name, count, shade, size=4)
        write_images(tmp_path / "data" / "val" / name, 2, shade + 5, size=4)
    plan = plan_of(start, tmp_path, dataset=str(tmp_path / "data"))
    assert plan.recipe == AUTO
    chosen = plan.config.to_flat()
    assert {name: chosen[name] for name in tier.settings} == tier.settings  # type: ignore[attr-defined]


def test_it_is_the_default_for_pretrained_weights_only(start: Path, photos: Path, tmp_path: Path) -> None:
    assert plan_of(start, tmp_path, dataset=str(photos)).recipe == AUTO
    assert plan_of(start, tmp_path, dataset=str(photos), pretrained=False).recipe is None
    assert plan_of(start, tmp_path, dataset=str(photos), recipe="finetune").recipe == "finetune"
    assert plan_of(start, tmp_path).recipe == "quickstart"


def test_settings_of_the_user_come_first(start: Path, photos: Path, tmp_path: Path) -> None:
    plan = plan_of(start, tmp_path, dataset=str(photos), epochs=3.0, batch_size=4, freeze="none", fit_head=False)
    config = plan.config
    assert (config.epochs, config.batch_size, config.finetune.freeze, config.finetune.fit_head) == (3, 4, "none", False)


def test_a_choice_that_contradicts_the_user_is_not_made(start: Path, photos: Path, tmp_path: Path) -> None:
    plan = plan_of(start, tmp_path, dataset=str(photos), head_epochs=2.0)
    assert not plan.config.finetune.fit_head
    assert plan.config.epochs > 2
    for split in ("train", "test"):
        buffers = [(photos / "train" / name / "000.png").read_bytes() for name in ("dark", "light")]
        rows = {"image": [{"bytes": image, "path": None} for image in buffers], "label": [0, 1]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
        (tmp_path / "stream").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "stream" / f"{split}.parquet")
    streamed = plan_of(start, tmp_path, dataset=str(tmp_path / "stream"), streaming=True, max_steps=9)
    assert streamed.recipe == AUTO
    assert not streamed.config.finetune.fit_head


def test_a_classifier_for_the_same_classes_is_kept(photos: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    model = small_model(tmp_path / "model", model, num_classes=2, label_names=["light", "dark"])
    plan = plan_of(model, tmp_path, dataset=str(photos))
    assert not plan.config.finetune.fit_head
    assert plan.config.epochs == MANY.settings["epochs"]


def test_the_plan_says_what_was_chosen(start: Path, photos: Path, tmp_path: Path, command: Command) -> None:
    words = ("--dataset", photos, "--model", f"local-dir:{start}", "--threads", 1, "--output-dir", tmp_path / "run")
    code, _, err = command("train", *words)
    assert code == 0, err
    said = "(10 training images per class): only the classifier is trained, by logistic regression on cached features"
    assert said in err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.command.startswith("accelerate launch scripts/train.py --recipe auto")
    assert record.steps == 0
    code, out, _ = command("train", *words)
    assert code == 0
    assert "is already finished" in out


def test_a_run_keeps_what_was_chosen_when_it_started(start: Path, photos: Path, tmp_path: Path) -> None:
    plan = plan_of(start, tmp_path, dataset=str(photos))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    earlier = plan.config.to_flat() | {"epochs": 7.0, "lr": 0.123, "fit_head": False, "freeze": "none"}
    folder.config.write_text(yaml.safe_dump(earlier))
    kept = plan_of(start, tmp_path, dataset=str(photos)).config.to_flat()
    before = read_config(folder)
    assert {name: kept[name] for name in SETTINGS} == {name: before[name] for name in SETTINGS}
    assert kept["lr"] == 0.123


def test_a_killed_run_resumes_bit_for_bit(start: Path, photos: Path, tmp_path: Path, command: Command) -> None:
    flags = ("--dataset", photos, "--model", f"local-dir:{start}", "--threads", 1, "--mixed-precision", "no")
    flags += ("--epochs", 12, "--checkpoint-every", 4, "--log-samples", "--lr", 1e-4, "--optimizer", "adamw")
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    kill_at(6, tmp_path / "killed", *flags)
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    for name, tensor in weights(tmp_path / "whole").items():
        assert tensor.equal(weights(tmp_path / "killed")[name]), name


def test_the_tiers_are_listed(command: Command) -> None:
    code, out, _ = command("recipes", "auto")
    assert code == 0
    assert "up to 100 training images per class:" in out
    assert "more images per class:" in out
