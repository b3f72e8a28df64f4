"""Checkpoints are complete or absent, and a run folder is locked by one run."""

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import torch
from pytest import LogCaptureFixture, MonkeyPatch, mark, raises
from support import warm_start
from support.records import DAMAGES, NO_FILES, replace_by

from resnext_hub.errors import RequestError
from resnext_hub.files import link_or_copy, new_folder, write_atomic
from resnext_hub.run_folder import RunFolder, RunLock
from resnext_hub.training.checkpoint import (
    BestFacts,
    CheckpointConfig,
    StateFacts,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.1)}
TENSORS = {"model": WEIGHTS, "optimizer": {"state.0.step": torch.tensor(1.0)}}
FACTS = StateFacts(
    optimizer={"state": {}, "group": {}},
    scaler=None,
    best=BestFacts(step=1, correct=3, loss=0.1 + 0.2, epoch=0.5),
    how={"processes": 1},
    wall_seconds=1.5,
    resumes=0,
    skipped_steps=0,
    evaluated=True,
    position=(0, 3),
    fingerprint="f",
    settings={"lr": 0.1, "seed": 0},
)


def test_a_checkpoint_restores_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    strided = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    save_checkpoint(folder, 5, TENSORS | {"model": {"w": strided}}, FACTS, keep=2)
    found = latest_checkpoint(folder)
    assert found is not None
    assert (found.step, found.facts) == (5, FACTS)
    assert torch.equal(found.tensors("model")["w"], strided)


def test_rotation_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, TENSORS, FACTS, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


@mark.parametrize("damage", ["bytes", "missing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    tmp_path: Path, damage: str, caplog: LogCaptureFixture
) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, TENSORS, FACTS, keep=2)
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
    assert "step-00000002 is damaged and is skipped" in caplog.text


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_a_flipped_bit_in_the_state_is_detected_or_harmless(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2)
    content = (path / "state.json").read_bytes()
    read, errors = [], []
    for bit in range(0, 8 * len(content), 29):
        (path / "state.json").write_bytes(flipped(content, bit))
        try:
            read.append(read_checkpoint(path).facts)
        except RequestError as error:
            errors.append(str(error))
    assert all("state.json is damaged" in error and "\n" not in error for error in errors)
    assert all(facts == FACTS for facts in read)  # whitespace, the case of an exponent
    assert len(errors) > 10 * len(read)


@mark.parametrize("damage", [*DAMAGES, *NO_FILES])
@mark.parametrize("name", ["state.json", "model.safetensors"])
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2)
    if damage in NO_FILES:
        replace_by(path / name, damage)
    else:
        (path / name).write_bytes(DAMAGES[damage]((path / name).read_bytes()))
    with raises(RequestError, match=rf"{name} (is damaged|cannot be read)") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def unsealed(path: Path) -> dict[str, object]:
    """Rewrite state.json in the format without a digest; return the state."""
    state = json.loads((path / "state.json").read_text())["state"]
    del state["facts"]["settings"], state["facts"]["best"]["epoch"]
    (path / "state.json").write_text(json.dumps(state))
    return state


def test_a_checkpoint_without_a_digest_of_its_state_is_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2)
    unsealed(path)
    facts = read_checkpoint(path).facts
    assert facts.best == BestFacts(step=1, correct=3, loss=0.1 + 0.2, epoch=None)
    assert facts.settings == {}


@mark.parametrize(
    ("where", "value"),
    [
        (("step",), 6),
        (("step",), "5"),
        (("sha256",), {}),
        (("sha256", "../config.json"), "0"),
        (("facts",), {}),
        (("facts", "best"), {"step": 1}),
        (("facts", "decoders"), []),
        (("facts", "position"), [1]),
        (("facts", "wall_seconds"), None),
        (("facts", "merged_groups"), {"layer": "two"}),
        (("sparkle",), 1),
    ],
)
def test_a_state_with_unexpected_fields_or_types_is_damaged(
    tmp_path: Path, where: tuple[str, ...], value: object
) -> None:
    path = save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2)
    state = inner = unsealed(path)
    for part in where[:-1]:
        inner = inner[part]  # type: ignore[assignment]
    inner[where[-1]] = value
    (path / "state.json").write_text(json.dumps(state))
    with raises(RequestError, match=r"state.json is damaged"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_model_or_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    found = read_checkpoint(save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2))
    assert torch.equal(found.matching("model", WEIGHTS)["w"], WEIGHTS["w"])
    for expected, message in (
        (
            {"w": torch.zeros(3, 3), "b": torch.zeros(())},
            r"w of its model.safetensors is \(2, 3\) float32, expected \(3, 3\) float32",
        ),
        ({"w": torch.zeros(2, 3).half(), "b": torch.zeros(())}, r"is \(2, 3\) float32, expected \(2, 3\) float16"),
        ({"w": torch.zeros(2, 3), "c": torch.zeros(())}, "model.safetensors lacks c"),
        ({"w": torch.zeros(2, 3)}, "model.safetensors has an unexpected tensor b"),
    ):
        with raises(RequestError, match=message):
            found.matching("model", expected)
    found.require_settings({"lr": 0.1, "seed": 0, "added_later": 1})
    with raises(
        RequestError,
        match=r"step-00000005 is not a checkpoint of this run \(lr was 0.1 and is now 0.2; seed was 0 and is now 1\)",
    ):
        found.require_settings({"lr": 0.2, "seed": 1})


def test_only_folders_named_like_checkpoints_are_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2)
    for name in ("step-9", "step-000000009", "step-٣٣٣٣٣٣٣٣", "step-"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5


def test_an_interrupted_write_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, FACTS, keep=2)
    partial = tmp_path / ".partial-step-00000002"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"partial")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_failure_while_a_folder_is_written_keeps_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with new_folder(folder) as aside:
        (aside / "file").write_text("old")

    def fail() -> None:
        with new_folder(folder) as aside:
            (aside / "file").write_text("new")
            raise RuntimeError("interrupted")

    with raises(RuntimeError, match="interrupted"):
        fail()
    assert (folder / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, "old")
    write_atomic(path, json.dumps({"new": 1}))
    assert json.loads(path.read_text()) == {"new": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


HOLDER = """
import sys, time
from pathlib import Path
from resnext_hub.run_folder import RunFolder, RunLock
lock = RunLock(RunFolder(Path(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_names_its_holder_and_is_released_when_the_holder_is_killed(tmp_path: Path) -> None:
    with warm_start.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with raises(RequestError, match=f"in use by a running process, pid {holder.pid}"):
            RunLock(RunFolder(tmp_path))
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RunLock(RunFolder(tmp_path)):
        pass


def test_a_file_system_without_locks_causes_a_warning(
    tmp_path: Path, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    logging.getLogger("resnext_hub").propagate = True
    with RunLock(RunFolder(tmp_path)):
        assert "cannot be locked (No locks available); make sure that no other command uses it" in caplog.text


@mark.parametrize("kind", NO_FILES)
def test_a_lock_file_that_is_not_a_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / ".lock").touch()
    replace_by(tmp_path / ".lock", kind)
    with raises(RequestError, match=r"\.lock is not a regular file"):
        RunLock(RunFolder(tmp_path))


def test_a_file_system_without_links_permissions_and_fsync_of_folders_is_enough(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def flush_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", flush_files_alone)
    path = save_checkpoint(tmp_path, 5, TENSORS, FACTS, keep=2)
    link_or_copy(str(path / "state.json"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == (path / "state.json").read_bytes()
    assert read_checkpoint(path).step == 5


def test_replacing_a_linked_folder_replaces_only_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / "model").symlink_to("elsewhere")
    (tmp_path / ".partial-model").symlink_to("elsewhere")
    with new_folder(tmp_path / "model") as aside:
        (aside / "new").touch()
    assert not (tmp_path / "model").is_symlink()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["mine"]


@mark.parametrize("value", ["0", "10s", "m", "-5", "1.5m"])
def test_checkpoint_every_takes_steps_or_minutes(value: str) -> None:
    with raises(RequestError, match=f"checkpoint_every={value}: expected steps, such as 500, or minutes, such as 10m"):
        CheckpointConfig(checkpoint_every=value)
    assert CheckpointConfig(checkpoint_every="500").steps == 500
    assert CheckpointConfig(checkpoint_every="10m").seconds == 600
