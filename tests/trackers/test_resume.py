"""A run that is killed twice is one run in every tracker, with each step once, as in metrics.jsonl."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pytest import MonkeyPatch, fixture, mark
from support import tracked, warm_start
from support.processes import ROOT, TINY, run_process

FLAGS = (
    *TINY, "--image-size", 64, "--batch-size", 32, "--max-steps", 60, "--lr", 0.01, "--log-every", 2,
    "--eval-every", 0.2, "--eval-fraction", 0.05, "--checkpoint-every", 20,
)  # fmt: skip

pytestmark = mark.slow


@fixture(scope="module")
def killed(tmp_path_factory) -> Iterator[Path]:
    """A run with all trackers that are installed, killed between checkpoints and resumed, twice."""
    folder = tmp_path_factory.mktemp("tracked")
    run = folder / "photos"
    with MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        flags = (*FLAGS, "--track", ",".join(tracked.INSTALLED))
        for checkpoint in (20, 40):
            with start(run, *flags) as process:
                while process.poll() is None and tracked_step(run) <= checkpoint:
                    time.sleep(0.01)
                process.kill()
            assert process.returncode == -signal.SIGKILL
            (*_, newest) = sorted(path.name for path in (run / "checkpoints").iterdir())
            assert newest == f"step-{checkpoint:08d}"
            assert tracked_step(run) > checkpoint  # so the resume repeats steps
        done = run_process("scripts/train.py", *flags, "--output-dir", run)
        assert done.returncode == 0, done.stderr
        assert "resuming from step-00000040" in done.stderr
        yield run


def start(run: Path, *flags: object) -> "subprocess.Popen[str]":
    words = [sys.executable, "scripts/train.py", *map(str, flags), "--output-dir", str(run)]
    return warm_start.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def tracked_step(run: Path) -> int:
    """Return the last step that both TensorBoard and Trackio have."""
    found = [tracked.tensorboard(run)]
    if "trackio" in tracked.INSTALLED:
        found.append(tracked.trackio(run.parent / "trackio"))
    return min(max((step for _, step, _ in values), default=0) for values in found)


def test_tensorboard_has_each_step_once(killed: Path) -> None:
    found, expected = tracked.tensorboard(killed), tracked.expected(killed)
    assert [value[:2] for value in found] == [value[:2] for value in expected]
    single = [(name, step, float(np.float32(value))) for name, step, value in expected]
    assert tracked.without_clock(found) == tracked.without_clock(single)


@tracked.needs_trackio
def test_trackio_has_each_step_once(killed: Path) -> None:
    found, expected = tracked.trackio(killed.parent / "trackio"), tracked.expected(killed)
    assert [value[:2] for value in found] == [value[:2] for value in expected]
    assert tracked.without_clock(found) == tracked.without_clock(expected)
    (database,) = (killed.parent / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        assert len(set(connection.execute("SELECT run_name, run_id FROM metrics"))) == 1


def test_wandb_has_one_offline_run_with_each_step_once(killed: Path) -> None:
    assert len(list((killed / "trackers" / "wandb").glob("offline-run-*"))) == 1
    assert tracked.wandb(killed) == tracked.expected(killed)


@tracked.needs_mlflow
def test_mlflow_has_one_run_with_each_step_once(killed: Path) -> None:
    found, expected = tracked.mlflow(killed), tracked.expected(killed)
    assert [value[:2] for value in found] == [value[:2] for value in expected]
    assert tracked.without_clock(found) == tracked.without_clock(expected)
    with sqlite3.connect(killed / "trackers" / "mlflow" / "mlflow.db") as database:
        assert database.execute("SELECT COUNT(*) FROM runs").fetchall() == [(1,)]


def test_a_tracker_that_fails_does_not_stop_the_run_and_gets_all_steps_at_its_end(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The process that stores what wandb logs is killed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with start(tmp_path, *FLAGS, "--track", "wandb") as run:
        while run.poll() is None and not (tmp_path / "checkpoints" / "step-00000020").is_dir():
            time.sleep(0.01)
        (service,) = [pid for pid in children(run.pid) if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(service, signal.SIGKILL)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert (
        err.count("wandb failed (Connection lost); the run continues without it, and logs the missing metrics when")
        == 1
    )
    assert tracked.wandb(tmp_path) == tracked.expected(tmp_path)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
