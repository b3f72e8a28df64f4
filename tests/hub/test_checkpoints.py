"""Checkpoints on the Hub: a run resumes bit for bit on another machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from pytest import fixture
from safetensors.torch import load_file
from support import warm_start
from support.client import Client
from support.loopback_hub import Fault, LoopbackHub, serve
from support.processes import ROOT, TINY, run_process, write_images

from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

PUSHED = ("--push-checkpoints", "--repo-id", "me/run", "--private")


@fixture
def hub() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_of_a_lost_machine_resumes_from_the_hub_bit_for_bit(hub: LoopbackHub, tmp_path: Path) -> None:
    """The dataset is a local folder, at another path on the second machine."""
    for name, shade in (("a", 60), ("b", 180)):
        write_images(tmp_path / "here" / "pets" / name, 30, shade)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    flags = (
        *TINY, "--image-size", 32, "--batch-size", 8, "--max-steps", 60, "--lr", 0.01, "--checkpoint-every", 5,
        "--ema", 0.9, "--log-samples",
    )  # fmt: skip
    here, there = ("--dataset", tmp_path / "here" / "pets"), ("--dataset", tmp_path / "there" / "pets")
    environment = hub.environment() | {"HF_HOME": str(tmp_path / "home")}
    alone = tmp_path / "alone"
    assert run_process("scripts/train.py", *flags, *here, "--output-dir", alone).returncode == 0

    lost = tmp_path / "lost"
    words = [sys.executable, "scripts/train.py", *map(str, (*flags, *here, *PUSHED)), "--output-dir", str(lost)]
    with warm_start.Popen(
        words, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and run.poll() is None:
            repo = hub.repos.get("models/me/run")
            commits = sum("/commit/checkpoints" in request for request in hub.requests)
            branch = repo.branches.get("checkpoints") if repo else None  # for a moment empty while it is squashed
            if commits > 1 and branch and branch[-1].files:
                break
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    shutil.rmtree(lost)
    repo = hub.repos["models/me/run"]
    assert repo.private
    assert [commit.files for commit in repo.commits] == [{}]  # main is reserved for the model
    files = repo.branches["checkpoints"][-1].files
    (step,) = {name.partition("/")[0] for name in files if name.startswith("step-")}
    assert {name for name in files if name.startswith(step)} >= {f"{step}/state.json", f"{step}/model.safetensors"}
    published = b"".join(files[name] for name in files if not name.endswith(".safetensors")).decode()
    assert str(tmp_path) not in published
    assert "hf_loopback" not in published

    found = tmp_path / "found"
    # --log-samples is not inherited; --threads, which affects the last bits, is
    mine = ("--log-samples", *there, *PUSHED, "--output-dir", found)
    words = ("scripts/train.py", "--resume-from", "hub:me/run", *mine)
    hub.faults.append(Fault("POST /api/repos/create", "507", 1))
    assert run_process(*words, **environment).returncode == 1  # and the next attempt works
    found.mkdir(exist_ok=True)
    # as if the next attempt was killed before the checkpoint was copied
    shutil.copy(alone / "config.yaml", found / "config.yaml")
    settings = yaml.safe_load((found / "config.yaml").read_text())
    settings |= {"dataset": str(tmp_path / "there" / "pets"), "push_checkpoints": True, "repo_id": "me/run"}
    (found / "config.yaml").write_text(yaml.safe_dump(settings))
    done = run_process(*words, **environment)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {step}" in done.stderr
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(found)[name]), name
    record = RunRecord.load(found / "record.json")
    assert (record.steps, record.resumes) == (60, 1)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (alone, found)
    ]
    assert [line.get("loss") for line in logs[0]] == [line.get("loss") for line in logs[1]]
    assert [line.get("eval_loss") for line in logs[0]] == [line.get("eval_loss") for line in logs[1]]
    # the last checkpoint was pushed, and replaced the others
    assert {n.partition("/")[0] for n in repo.branches["checkpoints"][-1].files if "/" in n} == {"step-00000060"}
    assert not list((found / "checkpoints").glob(".*"))


def test_changed_settings_or_a_damaged_state_do_not_resume(hub: LoopbackHub, tmp_path: Path) -> None:
    with contextlib.closing(Client(hub, tmp_path / "home")) as client:
        words = ("train", *TINY, "--max-steps", 4, "--lr", 0.01, *PUSHED, "--output-dir", tmp_path / "run")
        assert client.command(*words)[0] == 0
        _refuse_damaged_states(hub, client, tmp_path)
        changed = ("--lr", 0.02, "--seed", 3, "--output-dir", tmp_path / "other")
        code, _, err = client.command("train", "--resume-from", "hub:me/run", *changed)
        assert code == 2
        assert "--lr was 0.01 and is now 0.02" in err
        code, _, err = client.command("train", "--resume-from", "hub:me/none")
        assert code == 2
        assert "the repository or its branch checkpoints does not exist, or is private" in err


def _refuse_damaged_states(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """Check that a damaged state on the Hub is an error, and never starts a run from scratch."""
    history = hub.repos["models/me/run"].branches["checkpoints"]
    words = ("train", "--resume-from", "hub:me/run", "--output-dir", tmp_path / "damaged", *PUSHED)
    hub.faults.append(Fault("GET .*/resolve/.*/state.json", "wrong bytes", 1))
    code, _, err = client.command(*words)
    assert code == 1, err
    assert re.search(r"step-00000004/state.json does not match its hash on the Hub; it was removed from the cache", err)
    good = history[-1]
    state = good.files["step-00000004/state.json"]
    odd = {"../evil.json": b"x", "step-00000004/../../evil.json": b"x", "/etc/evil": b"x", "pytorch_model.bin": b"x"}
    for files in (
        {"step-00000004/state.json": state.replace(b'"resumes": 0', b'"resumes": 1')} | odd,
        {"step-00000004/state.json": b"[]"},
        {"config.yaml": b"lr: ["},
        {"config.yaml": b"push_to_hub: !!python/name:os.system x"},
    ):
        hub.repos["models/me/run"].commit("damaged", good.files | files, "checkpoints")
        code, _, err = client.command(*words)
        assert code in (1, 2), err
        assert "is damaged" in err or "config.yaml cannot be read" in err
        assert not list(tmp_path.rglob("evil*"))
        assert history[-1].message == "damaged"
    history.append(good)


PUSHES = """
from pathlib import Path
from resnext_hub.hub import remote
from resnext_hub.hub.checkpoints import CheckpointPusher
remote.PAUSE = {pause}
pusher = CheckpointPusher("me/run", True, "lr: 0.1")
for step in range(1, {steps} + 1):
    path = Path({folder!r}, "checkpoints", f"step-{{step:08d}}")
    path.mkdir(parents=True)
    Path(path, "model.safetensors").write_bytes(bytes([step]) * 200_000)
    pusher.push(path)
    if {each}:
        pusher.finish()
pusher.finish()
"""


def stored(hub: LoopbackHub) -> set[str]:
    """Return the names of the checkpoints in any commit of the branch."""
    history = hub.repos["models/me/run"].branches["checkpoints"]
    return {name.partition("/")[0] for commit in history for name in commit.files if name.startswith("step-")}


def test_the_hub_stores_one_checkpoint_however_many_are_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.append(Fault("POST .*/super-squash/", "503", 1))
    with contextlib.closing(Client(hub, tmp_path / "home")) as client:
        done = client.run(PUSHES.format(folder=str(tmp_path / "run"), steps=20, pause=0.01, each=True))
    assert done["code"] == 0, done["err"]
    # the next push frees it
    assert done["err"].count("the storage of older checkpoints in me/run could not be freed") == 1
    assert "could not be uploaded" not in done["err"]
    assert sum("/commit/checkpoints" in request for request in hub.requests) == 20
    assert stored(hub) == {"step-00000020"}
    assert [commit.files for commit in hub.repos["models/me/run"].commits] == [{}]  # main is unchanged


def test_a_checkpoint_that_is_waiting_or_retried_is_dropped_for_a_newer_one(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/checkpoints", "503", 1))
    with contextlib.closing(Client(hub, tmp_path / "home")) as client:
        done = client.run(PUSHES.format(folder=str(tmp_path / "run"), steps=5, pause=1, each=False))
    assert done["code"] == 0, done["err"]
    assert sum("/commit/checkpoints" in request for request in hub.requests) == 2  # the one that failed, and the newest
    assert stored(hub) == {"step-00000005"}


def test_failed_checkpoint_uploads_do_not_stop_training(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/checkpoints", "507", 1000))
    words = ("train", *TINY, "--max-steps", 20, "--lr", 0.01, "--checkpoint-every", 10, *PUSHED)
    words += ("--push-to-hub", "--license", "mit", "--output-dir", tmp_path / "run")
    with contextlib.closing(Client(hub, tmp_path / "home")) as client:
        (code, out, err), again = client.command(*words), client.command(*words)
    assert code == 0, err
    assert "a checkpoint could not be uploaded to me/run" in err
    assert "published and verified: http" in out
    repo = hub.repos["models/me/run"]
    assert len(repo.commits) == 2
    assert (
        repo.commits[-1].files["model.safetensors"] == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    )
    assert again[0] == 0, again[2]


def test_a_run_that_cannot_be_published_fails_before_training(
    hub: LoopbackHub, tmp_path: Path, command: Command
) -> None:
    base = ("train", *TINY, "--max-steps", 2, "--output-dir", tmp_path / "run")
    for flags, message in (
        (("--push-to-hub", "--license", "mit"), "--push-to-hub needs --repo-id"),
        (("--push-to-hub", "--repo-id", "me/run"), "--push-to-hub needs --license"),
        (("--push-checkpoints", "--repo-id", "me/run/more"), "--repo-id me/run/more"),
        (("--resume-from", "me/run"), "--resume-from me/run: expected hub:owner/name"),
    ):
        code, _, err = command(*base, *flags)
        assert code == 2, flags
        assert message in err
    with contextlib.closing(Client(hub, tmp_path / "home", "hf_readonlytokenofme")) as client:
        code, _, err = client.command(*base, "--push-to-hub", "--license", "mit", "--repo-id", "me/run")
    assert code == 1
    assert "cannot write to me/run: permission denied: the token cannot write there" in err
    assert "Training was not started" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
