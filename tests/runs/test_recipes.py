"""Every recipe trains, and what it turns on takes effect."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from pytest import fixture, mark
from support.processes import TINY, save_with_timm
from support.runs import kill_at, lines, weights, without_clock

from resnext_hub.record import RunRecord
from resnext_hub.runs.recipes import RECIPES

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def start(tmp_path_factory: object) -> Path:
    """Pretrained weights for the recipes that need them."""
    return save_with_timm(tmp_path_factory.mktemp("start") / "model", "test_resnet", 32)  # type: ignore[attr-defined]


SMALL = ("--dataset", "digits", "--image-size", 32, "--max-steps", 4, "--batch-size", 12, "--mixed-precision", "no")


@mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, start: Path, tmp_path: Path, command: Command) -> None:
    settings = RECIPES[name].settings
    model = f"local-dir:{start}" if settings.get("pretrained") else "test_resnet"
    size = ("--progressive-size", 32) if "progressive_size" in settings else ()
    words = ("--recipe", name, *SMALL, "--model", model, *size, "--threads", 1, "--output-dir", tmp_path / "run")
    code, _, err = command("train", *words)
    assert code == 0, err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    overridden = {"dataset", "model", "image_size", "progressive_size", "batch_size", "lr", "epochs", "warmup_epochs"}
    for setting, value in settings.items():
        if setting not in overridden:
            assert record.config[setting] == value, setting
    assert f"--recipe {name}" in record.command or name == "quickstart"


def test_repeated_augmentation_and_binary_cross_entropy_resume_bit_for_bit(tmp_path: Path, command: Command) -> None:
    flags = (
        *TINY, "--recipe", "rsb-a2", "--dataset", "digits", "--image-size", 32, "--max-steps", 24, "--batch-size", 36,
        "--checkpoint-every", 5, "--log-samples",
    )  # fmt: skip
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples-0.jsonl").read_text().splitlines()]
    for step in samples[:20]:
        assert len(set(step["indices"])) == 12
        assert len(set(step["pixels"])) > 30  # each occurrence is augmented in its own way
    kill_at(13, tmp_path / "killed", *flags)
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(tmp_path / "killed" / name)) == without_clock(lines(tmp_path / "whole" / name))


@mark.parametrize(
    ("flags", "message"),
    [
        (("--loss", "bce", "--class-weights", "auto"), "--loss bce does not support --class-weights auto"),
        (("--loss", "bce", "--logit-adjustment", 1), "--loss bce does not support --logit-adjustment 1.0"),
        (("--repeated-augmentation", 3, "--sampling", "balanced"), "cannot be combined with --sampling balanced"),
        (("--repeated-augmentation", 30), "--repeated-augmentation 30 needs --batch-size to be at least 30"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_by_name(
    tmp_path: Path, command: Command, flags: tuple[object, ...], message: str
) -> None:
    code, _, err = command("train", *TINY, *SMALL, *flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert message in err
