"""A run says first what it will do, how long it will take, and what is odd about its data; a dry run stops there."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pytest import MonkeyPatch, mark
from support.processes import TINY, run_process, write_images
from support.runs import weights

from resnext_hub.runs import estimate
from resnext_hub.runs.summary import duration

Command = Callable[..., tuple[int, str, str]]

FLAGS = (*TINY, "--image-size", 32, "--batch-size", 8)


@mark.parametrize(
    ("seconds", "words"),
    [(3.4, "3 s"), (89, "89 s"), (95, "1.6 min"), (599, "10 min"), (700, "12 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_durations_are_rounded_to_what_an_estimate_can_know(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    folder_of_classes: Path, tmp_path: Path, command: Command
) -> None:
    code, out, err = command(
        "train", *FLAGS, "--dataset", folder_of_classes, "--epochs", 40, "--dry-run", "--output-dir", tmp_path / "run"
    )
    assert code == 0, err
    for line in (
        r"model: test_resnet, random weights, 32 px",
        r"vehicles: 24 training images, 6 evaluation images \(held out, 20 %\), 3 classes",
        r"images: 40 x 40 to 46 x 40 px, RGB \(30 sampled\)",
        r"120 steps of 8 images: 1 process\(es\) x 8, 8 per pass; cpu, float32, 1 thread\(s\)",
        r"estimated time: \d+ s with 40 evaluations; memory: \d+\.\d GB per process",
        rf"run folder: {re.escape(str(tmp_path / 'run'))}",
        r"dry run: nothing was written",
    ):
        assert re.search(f"^{line}$", out, re.MULTILINE), (line, out)
    assert not (tmp_path / "run").exists()


def test_a_wrong_request_fails_in_a_dry_run_as_in_a_run(folder_of_classes: Path, command: Command) -> None:
    flags = ("train", *FLAGS, "--dataset", folder_of_classes, "--label-column", "nothing")
    assert command(*flags, "--dry-run")[2] == command(*flags)[2]
    code, _, err = command("train", "--dry-run", "--resume-from", "hub:me/model")
    assert code == 2
    assert "--dry-run does not download a run, so it cannot be combined with --resume-from" in err


def test_the_measurement_does_not_change_the_run(tmp_path: Path, command: Command, monkeypatch: MonkeyPatch) -> None:
    flags = ("train", *TINY, "--max-steps", estimate.FEWEST_STEPS, "--batch-size", 16, "--drop-rate", 0.2)
    code, _, err = command(*flags, "--output-dir", tmp_path / "measured")
    assert code == 0, err
    assert "estimated time" in err
    monkeypatch.setattr(estimate, "FEWEST_STEPS", 10**9)
    code, _, err = command(*flags, "--output-dir", tmp_path / "plain")
    assert code == 0, err
    assert "estimated time" not in err
    for name, tensor in weights(tmp_path / "plain").items():
        assert tensor.equal(weights(tmp_path / "measured")[name]), name


def test_the_settings_are_in_the_file_and_not_in_the_log(folder_of_classes: Path, tmp_path: Path) -> None:
    done = run_process(
        "scripts/train.py", *FLAGS, "--dataset", folder_of_classes, "--max-steps", 1, "--output-dir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "weight_decay" not in done.stderr
    assert "weight_decay: 0.0001" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_plan_states_the_imbalance_and_its_correction(tmp_path: Path, command: Command) -> None:
    for name, count, shade in (("common", 60, 60), ("rare", 4, 180)):
        write_images(tmp_path / "set" / "train" / name, count, shade)
        write_images(tmp_path / "set" / "val" / name, 12 if name == "common" else 3, shade + 20)
    flags = ("train", *FLAGS, "--dataset", tmp_path / "set", "--dry-run")
    _, out, err = command(*flags)
    assert "balance: 4 to 60 images per class (15:1), effective numbers 4 to 58; not corrected" in out
    assert "classes with fewer than 10 images in the evaluation split: rare" in err
    _, out, _ = command(*flags, "--sampling", "balanced")
    assert "(15:1), effective numbers 4 to 58; balanced sampling" in out
    _, out, _ = command(*flags, "--logit-adjustment", 1)
    assert "; logit adjustment 1" in out
    _, out, _ = command(*flags, "--class-weights", "auto")
    assert "; class weights auto" in out


def test_unreadable_images_are_named_before_training(folder_of_classes: Path, command: Command) -> None:
    (folder_of_classes / "car" / "003.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 255, (50, 60), dtype=np.uint8)
    Image.fromarray(noise).save(folder_of_classes / "bus" / "gray.png")
    _, out, err = command("train", *FLAGS, "--dataset", folder_of_classes, "--dry-run")
    assert re.search(r"1 of 31 sampled images are unreadable: \w+: car/003\.png \(not an image", err)
    assert "60 x 50 px, RGB, L (30 sampled)" in out


def test_progressive_sizes_are_measured_one_by_one(folder_of_classes: Path, command: Command) -> None:
    code, out, err = command(
        "train", *TINY, "--dataset", folder_of_classes, "--image-size", 64, "--progressive-size", 32, "--batch-size", 2,
        "--max-steps", estimate.FEWEST_STEPS, "--dry-run",
    )  # fmt: skip
    assert code == 0, err
    assert "estimated time" in out


def test_a_dry_run_refuses_a_split_without_readable_images(tmp_path: Path, command: Command) -> None:
    for split in ("train", "val"):
        for name, shade in (("cat", 60), ("dog", 180)):
            write_images(tmp_path / "set" / split / name, 3, shade)
    for path in (tmp_path / "set" / "val").glob("*/*.png"):
        path.write_bytes(b"no image")
    code, _, err = command("train", *FLAGS, "--dataset", tmp_path / "set", "--dry-run")
    assert code == 2
    assert "none of the 6 images of the evaluation split is readable" in err
