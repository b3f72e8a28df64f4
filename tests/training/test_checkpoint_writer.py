"""Checkpoints are written while training continues, and hold the state of their own step."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytest import fixture, raises
from safetensors.torch import load_file
from support import warm_start
from support.processes import ROOT, TINY
from support.runs import lines, weights, without_clock

from resnext_hub.errors import RunError
from resnext_hub.training.checkpoint import BestFacts, StateFacts, latest_checkpoint
from resnext_hub.training.checkpoint_writer import CheckpointWriter, Snapshot

Command = Callable[..., tuple[int, str, str]]

FLAGS = (
    *TINY, "--max-steps", 40, "--batch-size", 16, "--lr", 0.01, "--ema", 0.9, "--optimizer", "adamw", "--mixup", 0.2,
    "--eval-every", 1, "--log-samples",
)  # fmt: skip


def facts(step: int) -> StateFacts:
    """Facts with values that a run could change in place."""
    return StateFacts(
        optimizer={"state": {}, "group": {"0": {"lr": 0.1}}},
        scaler=None,
        best=BestFacts(step=step, correct=3, loss=0.5, epoch=0.5),
        how={"processes": 1},
        wall_seconds=1.5,
        resumes=0,
        skipped_steps=0,
        evaluated=True,
        position=(0, step),
        fingerprint="f",
    )


def snapshot(step: int, value: float = 0.0) -> Snapshot:
    weights = {"w": torch.full((2, 3), value)}
    return Snapshot.take(step, {"model": weights, "optimizer": {}}, {}, facts(step))


def test_a_snapshot_keeps_the_state_of_its_step_while_the_run_goes_on() -> None:
    torch.manual_seed(0)
    changing = {
        "model": {"conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "scalar": torch.tensor(2.5)},
        "optimizer": {"half": torch.randn(5).bfloat16(), "count": torch.tensor(7), "part": torch.randn(6)[::2]},
    }
    before = {name: {key: t.clone() for key, t in group.items()} for name, group in changing.items()}
    best, mine = {"b": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)}, facts(5)
    taken = Snapshot.take(5, changing, {"best": best}, mine)
    for group in changing.values():
        for tensor in group.values():
            tensor.add_(1)
    mine.optimizer["group"]["0"]["lr"] = 0.9
    assert taken.facts == facts(5)
    assert torch.equal(taken.tensors["best"]["b"], best["b"])
    for name, group in before.items():
        for key, tensor in group.items():
            assert torch.equal(taken.tensors[name][key], tensor)
            assert taken.tensors[name][key].dtype == tensor.dtype
    assert all(t.is_contiguous() for group in taken.tensors.values() for t in group.values())  # nothing left to compute


def test_training_goes_on_while_one_checkpoint_is_written_and_the_next_one_waits(tmp_path: Path) -> None:
    begun, release = threading.Event(), threading.Event()

    def finish_later(path: Path) -> None:
        begun.set()
        assert release.wait(60)

    with CheckpointWriter(tmp_path, 5, written=finish_later, failed=lambda: None) as writer:
        writer.write(lambda: snapshot(1))  # returns at once, or this test would hang here
        assert begun.wait(60)
        taken = []
        second = threading.Thread(target=lambda: writer.write(lambda: taken.append(2) or snapshot(2)))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert not taken  # the state of the second one is not even copied yet, so there is never more than one copy
        release.set()
        second.join(60)
        writer.wait()
        found = latest_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 2
        writer.write(lambda: snapshot(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]


def test_a_failed_write_is_reported_at_once_and_raised_by_the_next_call(tmp_path: Path) -> None:
    failed = threading.Event()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with CheckpointWriter(tmp_path, 2, written=lambda path: None, failed=failed.set) as writer:
            writer.write(lambda: snapshot(1))
            writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            writer.write(lambda: snapshot(2))
            assert failed.wait(60)
            with raises(RunError, match=r"checkpoint of step 2 could not be written .*; the last good checkpoint") as e:
                writer.write(lambda: snapshot(3))
            assert "step-00000001" in str(e.value)
            assert "\n" not in str(e.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_run_that_fails_completes_the_checkpoint_in_progress(tmp_path: Path) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path, 2, written=lambda path: time.sleep(0.2), failed=lambda: None) as writer:
            writer.write(lambda: snapshot(1))
            raise ZeroDivisionError

    with raises(ZeroDivisionError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """An uninterrupted run with a single checkpoint, at its end."""
    folder = tmp_path_factory.mktemp("writer") / "alone"
    words = [sys.executable, "scripts/train.py", *map(str, FLAGS), "--output-dir", str(folder)]
    done = warm_start.run(words, cwd=ROOT, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def kill_during_a_write(folder: Path, after: int) -> int:
    """Start a run with a checkpoint at every step; kill it while it writes one of a step after `after`.

    Returns:
        The step of that checkpoint; 0 if the write was complete before the signal arrived.
    """
    words = [sys.executable, "scripts/train.py", *map(str, FLAGS), "--checkpoint-every", "1"]
    with warm_start.Popen(
        [*words, "--output-dir", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        checkpoints = folder / "checkpoints"
        started = False
        while run.poll() is None:
            names = os.listdir(checkpoints) if started or checkpoints.is_dir() else []
            started = started or bool(names)
            if any(name.startswith(".partial-step-") and int(name[14:]) > after for name in names):
                run.send_signal(signal.SIGKILL)
                break
        run.wait()
        assert run.stderr is not None
        assert run.returncode == -signal.SIGKILL, run.stderr.read()
    return max((int(path.name[14:]) for path in checkpoints.glob(".partial-step-*")), default=0)


def test_a_run_killed_while_it_writes_checkpoints_resumes_bit_for_bit(
    tmp_path: Path, alone: Path, command: Command
) -> None:
    folder = tmp_path / "killed"
    during = [kill_during_a_write(folder, after) for after in (3, 13, 23)]
    assert any(during)
    code, _, err = command("train", *FLAGS, "--checkpoint-every", 7, "--output-dir", folder)
    assert code == 0, err
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    for name in ("model", "optimizer", "ema"):
        one, other = (load_file(f / "checkpoints" / "step-00000040" / f"{name}.safetensors") for f in (alone, folder))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(alone / name)) == without_clock(lines(folder / name)), name
    assert not list((folder / "checkpoints").glob(".partial-*"))


def test_a_checkpoint_written_while_later_steps_are_taken_resumes_bit_for_bit(
    tmp_path: Path, alone: Path, command: Command
) -> None:
    step = 15
    written, resumed = tmp_path / "written", tmp_path / "resumed"
    flags = (*FLAGS, "--checkpoint-every", step, "--keep-checkpoints", 100)
    assert command("train", *flags, "--output-dir", written)[0] == 0
    resumed.mkdir()
    name = f"step-{step:08d}"
    os.renames(written / "checkpoints" / name, resumed / "checkpoints" / name)
    for file in ("config.yaml", "metrics.jsonl", "samples-0.jsonl"):
        os.rename(written / file, resumed / file)
    code, _, err = command("train", *flags, "--output-dir", resumed)
    assert code == 0
    assert f"resuming from {name}" in err
    for key, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(resumed)[key]), key
