"""Checkpoints are complete or absent; a run folder belongs to one run."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from pytest import LogCaptureFixture, mark, raises

from resnext_hub.errors import RequestError
from resnext_hub.files import new_folder, write_atomic
from resnext_hub.training.checkpoint import CheckpointConfig, RunLock, latest_checkpoint, save_checkpoint

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.1)}}


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    strided = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    facts = {"loss": 0.1 + 0.2, "best": None}
    save_checkpoint(folder, 5, {"model": {"w": strided}}, facts, keep=2)
    found = latest_checkpoint(folder)
    assert found is not None
    assert (found.step, found.facts) == (5, facts)
    assert torch.equal(found.tensors("model")["w"], strided)


def test_rotation_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


@mark.parametrize("damage", ["bytes", "missing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: LogCaptureFixture
) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    if damage == "bytes":
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
    elif damage == "missing":
        (path / "model.safetensors").unlink()
    else:
        (path / "state.json").write_text("{")
    logging.getLogger("resnext_hub").propagate = True
    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged" in caplog.text


def test_an_interrupted_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=2)
    half = tmp_path / ".partial-step-00000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert not half.exists()


def test_a_failure_while_a_folder_is_filled_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with new_folder(folder) as aside:
        (aside / "file").write_text("old")

    def fail() -> None:
        with new_folder(folder) as aside:
            (aside / "file").write_text("new")
            raise RuntimeError("in the middle")

    with raises(RuntimeError, match="in the middle"):
        fail()
    assert (folder / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, "old")
    write_atomic(path, json.dumps({"new": 1}))
    assert json.loads(path.read_text()) == {"new": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


HOLDER = """
import sys, time
from pathlib import Path
from resnext_hub.training.checkpoint import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_names_its_holder_and_goes_when_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with raises(RequestError, match=f"in use by a running process, pid {holder.pid}"):
            RunLock(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RunLock(tmp_path):
        pass


@mark.parametrize("asked", ["0", "10s", "m", "-5", "1.5m"])
def test_checkpoint_every_takes_steps_or_minutes(asked: str) -> None:
    with raises(RequestError, match="expected steps, as 500, or minutes, as 10m"):
        CheckpointConfig(checkpoint_every=asked)
    assert CheckpointConfig(checkpoint_every="500").steps == 500
    assert CheckpointConfig(checkpoint_every="10m").seconds == 600
