"""`train --lr-find` suggests a learning rate that trains well, and leaves the run folder alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from pytest import mark
from support.processes import TINY, run_interpreter

from resnext_hub.record import RunRecord
from resnext_hub.training.lr_range import RangeTest, valley

Command = Callable[..., tuple[int, str, str]]


def found(folder: Path) -> dict:
    return json.loads((folder.parent / f"{folder.name}.lr-find" / "lr-find.json").read_text())


def test_the_suggestion_trains_better_than_much_lower_and_higher_learning_rates(
    tmp_path: Path, command: Command
) -> None:
    code, out, err = command("train", *TINY, "--lr-find", "--output-dir", tmp_path / "run")
    assert code == 0, err
    match = re.search(r"^suggested learning rate: --lr (\S+) \(current value: 0.003\)$", out, re.MULTILINE)
    assert match is not None
    losses = []
    for scale in (0.01, 1, 100):
        folder = tmp_path / f"run-{scale}"
        flags = ("--lr", float(match[1]) * scale, "--max-steps", 60, "--output-dir", folder)
        code, _, err = command("train", *TINY, *flags)
        assert code == 0, err
        losses.append(RunRecord.load(folder / "record.json").evaluation.loss)
    assert losses[1] == min(losses)
    assert losses[1] < 0.6 * min(losses[0], losses[2])


def test_it_is_deterministic_and_has_no_effect_on_a_run_in_the_run_folder(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "run"
    find = (
        "train",
        *TINY,
        "--ema",
        0.9,
        "--image-size",
        64,
        "--progressive-size",
        32,
        "--lr-find",
        "--output-dir",
        folder,
    )
    code, out, err = command(*find)
    assert code == 0, err
    beside = tmp_path / "run.lr-find"
    assert not folder.exists()
    assert sorted(path.name for path in beside.iterdir()) == ["lr-find.json", "lr-find.png"]
    assert f"values: {beside / 'lr-find.json'}\n" in out
    with Image.open(beside / "lr-find.png") as plot:
        assert plot.width > 600
    first = found(folder)
    assert len(first["lrs"]) == len(first["losses"]) == len(first["smoothed"])
    assert first["lrs"][0] == 1e-7
    code, _, err = command("train", *TINY, "--max-steps", 4, "--output-dir", folder)  # another run, trained
    assert code == 0, err
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    code, _, err = command(*find)
    assert code == 0, err
    assert found(folder) == first
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_loss_of_a_test_that_diverges_ends_it(tmp_path: Path, command: Command) -> None:
    flags = ("--lr", 0.001, "--head-lr", 1, "--batch-size", 16)  # the classifier has 1,000 times the learning rate
    code, out, err = command("train", *TINY, *flags, "--lr-find", "--output-dir", tmp_path / "run")
    assert code == 0, err
    test = found(tmp_path / "run")
    assert test["diverged"]
    assert len(test["lrs"]) < 100
    assert f"the loss diverged at a learning rate of {test['lrs'][-1]:.3g}, after {len(test['lrs'])} steps\n" in out


def test_the_valley_is_in_the_longest_stretch_of_falling_losses() -> None:
    lrs = [10.0**power for power in range(-12, 0)]
    losses = [3.0, 3.1, 3.0, 2.9, 2.7, 2.4, 2.0, 1.7, 1.5, 1.6, 2.5, 9.0]
    assert valley(lrs, losses) == lrs[3]
    assert valley(lrs, sorted(losses)) is None
    short = RangeTest(lrs=lrs[:3], losses=losses[:3], smoothed=losses[:3], diverged=True)
    assert short.suggestion is None


def test_it_is_refused_with_what_it_cannot_do(command: Command) -> None:
    for flag in ("--dry-run", "--resume-from=hub:me/run"):
        code, _, err = command("train", "--lr-find", flag)
        assert code == 2
        assert "--lr-find" in err
        assert flag.partition("=")[0] in err


@mark.slow
def test_two_processes_find_the_same_learning_rate_as_one(tmp_path: Path, command: Command) -> None:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d"]
    flags = ("train", *TINY, "--freeze", "none", "--lr-find", "--output-dir")
    done = run_interpreter(
        *words, "--rdzv_endpoint", "localhost:0", "scripts/train.py", *flags[1:], tmp_path / "two", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("suggested learning rate") == 1
    assert command(*flags, tmp_path / "one")[0] == 0
    one, two = found(tmp_path / "one"), found(tmp_path / "two")
    assert 0.2 < two["suggestion"] / one["suggestion"] < 5
