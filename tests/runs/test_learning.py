"""Every launcher reaches the accuracy of a plain run, with batch norm statistics of the published step.

All runs are compared with the plain one, because runs that are compared only with each other can fail in the same way.
"""

import json
import os
from pathlib import Path

import torch
from pytest import fixture, mark, raises
from safetensors.torch import load_file
from support.processes import TINY, run_process

from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.sources import load_digits_table
from resnext_hub.data.splits import load_splits
from resnext_hub.kernels.training_view import build_training_view, require_shared_tensors
from resnext_hub.models.resnext import ResNeXt
from resnext_hub.record import RunRecord

STEPS = 36
FLAGS = (*TINY, "--batch-size", "48", "--lr", "0.01", "--max-steps", str(STEPS), "--eval-every", "100")

LIKE_DIGITS = (
    "--image-size", "32", "--crop-pct", "1", "--interpolation", "bilinear", "--scale", "0.7", "1", "--hflip", "0",
    "--optimizer", "adamw", "--weight-decay", "0.05",
)  # fmt: skip
"""Settings of the quickstart recipe, for the same images from another source."""

GROUPED = {
    "architecture": "resnext50_32x4d",
    "num_classes": 10,
    "model_args": {"layers": [1, 1, 1, 1], "cardinality": 8, "base_width": 4},
    "pretrained_cfg": {"input_size": [3, 32, 32], "first_conv": "conv1", "classifier": "fc"},
}
"""config.json of a small model with grouped convolutions."""

NOISE = 36
"""Tolerance of correct predictions (of 360) between short runs; chance level is 36, these runs have over 280."""


def launch(processes: int, *runs: tuple[object, ...]) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    commands = json.dumps([["train", *map(str, run)] for run in runs])
    done = run_process(*launcher, "tests/support/runs_in_a_row.py", commands, timeout=600)
    assert done.returncode == 0, done.stderr


def correct(folder: Path) -> int:
    """Check that batch norm statistics are those of the published step; return the number of correct predictions."""
    record = RunRecord.load(folder / "record.json")
    assert record.evaluation.count == 360
    tensors = load_file(folder / "model" / "model.safetensors")
    counters = {int(tensor) for name, tensor in tensors.items() if name.endswith("num_batches_tracked")}
    assert counters == {record.evaluation.step}
    for name, tensor in tensors.items():
        if name.endswith("running_mean"):
            assert tensor.abs().max() > 0, name
        if name.endswith("running_var"):
            assert not torch.equal(tensor, torch.ones_like(tensor)), name
    return record.evaluation.correct


def write_stream(folder: Path) -> None:
    """Write the splits of the digits as parquet files, so a stream has the images of the plain run."""
    splits = load_splits(DataConfig())
    table = load_digits_table()
    for name, part in (("train-0", splits.train), ("train-1", splits.train), ("test-0", splits.eval)):
        assert isinstance(part, IndexedImages)
        chosen = {"train-0": part.indices[:700], "train-1": part.indices[700:]}.get(name, part.indices)
        table.select(chosen).to_parquet(folder / f"{name}.parquet")


@fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A plain run, and equal runs under launchers."""
    folder = tmp_path_factory.mktemp("learning")
    (folder / "grouped").mkdir()
    (folder / "grouped" / "config.json").write_text(json.dumps(GROUPED))
    grouped = ("--model", f"local-dir:{folder / 'grouped'}", "--no-pretrained", "--lr", "0.003", "--max-steps", "60")
    grouped += ("--merge-groups", "16")

    write_stream(folder / "stream")
    stream = ("--dataset", folder / "stream", "--streaming", "--shuffle-block", "500", *LIKE_DIGITS)

    def run(name: str, *flags: object) -> tuple[object, ...]:
        return (*FLAGS, *flags, "--output-dir", folder / name)

    plain = [["train", *map(str, words)] for words in (run("plain"), run("plain-grouped", *grouped))]
    done = run_process("tests/support/runs_in_a_row.py", json.dumps(plain))
    assert done.returncode == 0, done.stderr
    launch(1, run("1-ema", "--ema", "0.9"))
    launch(2, run("2-grouped", *grouped), run("2-resumed", "--max-steps", STEPS // 2), run("2-resumed"))
    launch(3, run("3-stream", *stream))
    words = ["-m", "accelerate.commands.launch", "scripts/train.py", *run("accelerate", "--threads", "auto")]
    done = run_process(*words)
    assert done.returncode == 0, done.stderr
    return folder


@mark.parametrize("name", ["1-ema", "2-grouped", "2-resumed", "3-stream", "accelerate"])
def test_a_launched_run_reaches_the_accuracy_of_the_plain_run(runs: Path, name: str) -> None:
    plain = correct(runs / ("plain-grouped" if name.endswith("grouped") else "plain"))
    assert plain > 200
    assert abs(correct(runs / name) - plain) <= NOISE


def test_a_run_under_accelerate_launch_uses_all_cores(runs: Path) -> None:
    """The launcher sets OMP_NUM_THREADS=1 in its child."""
    record = RunRecord.load(runs / "accelerate" / "record.json")
    assert (record.processes, record.hardware.threads) == (1, len(os.sched_getaffinity(0)))


def test_a_training_view_that_does_not_share_tensors_is_detected() -> None:
    model = ResNeXt(layers=(1, 1, 1), cardinality=4, base_width=4, num_classes=3)
    view = build_training_view(model, {"layer1.0.conv2": 2})
    require_shared_tensors(view, model)
    view.to("cpu:0")  # the same device, but it creates new buffers
    with raises(RuntimeError, match=r"buffer bn1\.num_batches_tracked is not shared"):
        require_shared_tensors(view, model)
    with raises(RuntimeError, match="parameter"):
        require_shared_tensors(ResNeXt(layers=(1, 1, 1), cardinality=4, base_width=4, num_classes=3), model)
