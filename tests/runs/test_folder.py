"""One command uses a run folder at a time, and the files in it are consistent."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from pytest import MonkeyPatch, fixture, mark, raises, skip
from safetensors.torch import load_file, save_file
from support.processes import TINY

from resnext_hub.errors import RequestError
from resnext_hub.files import sha256_of
from resnext_hub.processes.peers import Peers
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.job import execute, require_writable_paths
from resnext_hub.runs.public import public_model
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.training.checkpoint import latest_checkpoint
from resnext_hub.training.plan import Plan

Command = Callable[..., tuple[int, str, str]]


def plan_of(folder: Path, **asked: object) -> Plan:
    asked = {"model": "test_resnet", "max_steps": 30, "lr": 0.01, "warmup_epochs": 0.0, "threads": "1"} | asked
    asked |= {"mixed_precision": "no"}
    settings, recipe = merge_settings(asked)
    return prepare(settings, asked=asked, recipe=recipe, output_dir=folder)


@fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of 30 steps that a test may modify."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_folder_that_another_command_changed_after_planning_is_refused(finished: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", seed=7)
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with raises(RequestError, match=r"run was changed by another command"):
        execute(plan, Peers())
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != ".lock")


FOLDERS = ["model", "plots", "checkpoints"]
FILES = ["config.yaml", "metrics.jsonl", "predictions.parquet", "record.previous.json", "unreadable-1.jsonl", ".lock"]


@mark.parametrize("kind", ["file", "FIFO", "folder"])
@mark.parametrize("name", [*FOLDERS, *FILES])
def test_files_in_the_way_of_results_are_refused_before_training(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    {"file": path.touch, "FIFO": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    if kind == ("folder" if name in FOLDERS else "file"):
        require_writable_paths(RunFolder(tmp_path))
    else:
        with raises(RequestError, match=f"{name} is .*; remove it, or choose another output_dir"):
            require_writable_paths(RunFolder(tmp_path))


GROWN = ("train", *TINY, "--lr", 0.01, "--max-steps", 32)


def test_an_extended_run_is_unfinished_until_it_is_finished_again(
    run: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    card = run / "model" / "README.md"
    card.write_text(card.read_text() + "\nMy words.\n")
    words = (*GROWN, "--output-dir", run)
    with monkeypatch.context() as patch:  # writing fails between the weights and the card
        patch.setattr("pyarrow.parquet.write_table", full_disk)
        code, _, err = command(*words)
    assert code == 1
    assert len(re.findall("^error: ", err, re.MULTILINE)) == 1
    assert "training is complete and saved; rerun the same command to write them" in err
    for other in (("evaluate", run), ("push", run, "--repo-id", "me/x", "--license", "mit", "--dry-run")):
        code, _, err = command(*other)
        assert code == 2
        assert "is not finished; rerun its training command to resume it" in err
    code, _, err = command(*words)
    assert code == 0, err
    record = RunRecord.load(run / "record.json")
    assert record.steps == 32
    assert record.model.weights_sha256 == sha256_of(run / "model" / "model.safetensors")
    assert record.model.weights_sha256 in card.read_text()
    assert card.read_text().endswith("\nMy words.\n")
    assert RunRecord.load(run / "record.previous.json").steps == 30


@mark.parametrize("name", [".lock", "unreadable-0.jsonl", "metrics.jsonl", "config.yaml", "README.previous.md"])
def test_links_never_redirect_writes_to_other_files(run: Path, command: Command, name: str) -> None:
    precious = run.parent / "precious.txt"
    content = (run / name).read_bytes() if (run / name).is_file() else b"of great value\n"
    precious.write_bytes(content)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious)
    card = run / "model" / "README.md"
    card.write_text(card.read_text().replace("## Use", "## My use"))
    code, _, err = command(*GROWN, "--output-dir", run)
    in_place = name in (".lock", "unreadable-0.jsonl")
    assert code == (2 if in_place else 0), err
    assert (f"{name} is not a regular file; remove it" in err) == in_place
    assert precious.read_bytes() == content


def test_files_of_the_owner_are_moved_and_every_edited_card_is_kept(run: Path, command: Command) -> None:
    card = run / "model" / "README.md"
    for step in (31, 32):
        (run / "model" / "notes.txt").write_text(f"notes of {step}")
        (run / "plots" / "mine.png").write_text("drawn by hand")
        (run / "model" / "plots" / "ours.png").write_text("drawn by two hands")
        card.write_text(card.read_text().replace("# ", f"# Mine of {step}: ", 1))
        code, _, err = command(*GROWN[:-1], step, "--output-dir", run)
        assert code == 0, err
        assert "other files in it were moved to model.previous" in err
        assert ": notes.txt" in err
    assert (run / "model.previous" / "notes.txt").read_text() == "notes of 31"
    assert (run / "model.previous-2" / "notes.txt").read_text() == "notes of 32"
    assert (run / "plots.previous-2" / "mine.png").is_file()
    assert (run / "model.plots.previous" / "ours.png").is_file()
    assert "Mine of 31" in (run / "README.previous.md").read_text()
    assert "Mine of 32" in (run / "README.previous-2.md").read_text()


def damage(model: Path, how: str) -> None:
    config = json.loads((model / "config.json").read_text())
    match how:
        case "no folder":
            shutil.rmtree(model)
        case "short weights":
            os.truncate(model / "model.safetensors", 1000)
        case "other weights":
            tensors = load_file(model / "model.safetensors")
            save_file(tensors | {"fc.bias": tensors["fc.bias"] + 1e-6}, model / "model.safetensors")
        case "other names":
            names = config["label_names"][::-1]
            (model / "config.json").write_text(json.dumps(config | {"label_names": names}))


@mark.parametrize("how", ["no folder", "short weights", "other weights", "other names"])
def test_a_damaged_model_folder_is_detected_and_restored(run: Path, command: Command, how: str) -> None:
    weights = sha256_of(run / "model" / "model.safetensors")
    damage(run / "model", how)
    code, out, _ = command("evaluate", run)
    assert code != 0
    assert out == ""
    code, out, err = command("train", *TINY, "--lr", 0.01, "--max-steps", 30, "--output-dir", run)
    assert code == 0, err
    assert "; writing the model folder again" in err
    assert sha256_of(run / "model" / "model.safetensors") == weights
    assert command("evaluate", run)[0] == 0
    damage(run / "model", how)
    shutil.rmtree(run / "checkpoints")
    code, _, err = command("train", *TINY, "--lr", 0.01, "--max-steps", 30, "--output-dir", run)
    assert code == 2
    assert "no checkpoint is left to restore it from" in err


def replace_checkpoint(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Turn the newest checkpoint into one of another run, in the format without a digest."""
    found = latest_checkpoint(folder / "checkpoints")
    assert found is not None
    state = json.loads((found.path / "state.json").read_text())["state"]
    del state["facts"]["settings"]
    tensors = {name: load_file(found.path / name) for name in state["sha256"]}
    change({"state": state, "tensors": tensors})
    for name, group in tensors.items():
        save_file(group, found.path / name)
        state["sha256"][name] = sha256_of(found.path / name)
    (found.path / "state.json").write_text(json.dumps(state))


def drop_weight(content: dict) -> None:
    del content["tensors"]["model.safetensors"]["fc.weight"]


def other_optimizer(content: dict) -> None:
    for group in content["state"]["facts"]["optimizer"]["group"].values():
        del group["betas"]
        group["momentum"] = 0.9


def other_classes(content: dict) -> None:
    tensors = content["tensors"]["model.safetensors"]
    tensors["fc.weight"] = tensors["fc.weight"][:3].clone()


def other_dataset(content: dict) -> None:
    content["state"]["facts"]["fingerprint"] = "0" * 64


def other_groups(content: dict) -> None:
    content["state"]["facts"]["merged_groups"] = {"layer9.conv": 2}


def odd_index(content: dict) -> None:
    tensors = content["tensors"]["optimizer.safetensors"]
    tensors["state.999.step"] = tensors["state.0.step"].clone()


@mark.parametrize(
    ("change", "message"),
    [
        (drop_weight, "model.safetensors lacks fc.weight"),
        (other_classes, "float32, expected (10,"),
        (other_optimizer, "its optimizer has the option momentum, which"),
        (other_dataset, "the images of digits have changed"),
        (other_groups, "merged groups belong to a different model"),
        (odd_index, "its optimizer state does not match"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    run: Path, command: Command, change: Callable[[dict], None], message: str
) -> None:
    replace_checkpoint(run, change)
    code, _, err = command(*GROWN, "--output-dir", run)
    assert code == 2, err
    assert "step-00000030" in err
    assert message in err
    assert len(re.findall("^error: ", err, re.MULTILINE)) == 1


def test_resume_without_a_run_logs_a_warning(tmp_path: Path, command: Command) -> None:
    code, _, err = command("train", *TINY, "--resume", "--lr", -1, "--output-dir", tmp_path / "run")
    assert code == 2
    assert "--lr" in err
    from resnext_hub.runs import request

    settings, recipe = merge_settings({"model": "test_resnet"})
    messages: list[str] = []
    request._logger.addFilter(lambda entry: bool(messages.append(entry.getMessage())) or True)
    prepare(settings, asked={}, recipe=recipe, output_dir=tmp_path / "run", resume=True)
    assert messages == [f"--resume is ignored because {tmp_path / 'run'} contains no run; starting at step 0"]
    request._logger.filters.clear()


def test_a_local_model_is_published_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "alice" / "model").mkdir(parents=True)
    assert public_model(f"local-dir:{tmp_path / 'alice' / 'model'}") == "local-dir:model"
    (tmp_path / "alice" / "config.yaml").touch()
    assert public_model(f"local-dir:{tmp_path / 'alice' / 'model'}") == "local-dir:alice/model"
    assert public_model("hf-hub:me/x@v1") == "hf-hub:me/x@v1"


def test_a_run_ends_in_one_line_on_a_full_disk_and_resumes_later(tmp_path: Path, command: Command) -> None:
    """The disk has space for two checkpoints, but not for the model folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        skip("permission to mount a file system is missing")
    try:
        words = ("train", *TINY, "--max-steps", 2, "--lr", 0.01, "--checkpoint-every", 1, "--output-dir", disk / "run")
        code, _, err = command(*words)
        assert code == 1
        assert len(re.findall("^error: ", err, re.MULTILINE)) == 1
        assert "No space left on device" in err
        assert "rerun the same command to write them" in err
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        code, _, err = command(*words)
        assert code == 0, err
    finally:
        subprocess.run(["umount", disk], check=True)
