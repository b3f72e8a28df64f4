"""Trackers get settings, metrics and plots; their failures never stop a run, and wrong requests are refused at once."""

import getpass
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pytest import MonkeyPatch, fixture, mark
from support import tracked
from support.processes import ROOT, TINY, run_process, write_images
from support.runs import lines

Command = Callable[..., tuple[int, str, str]]

LOCAL = tuple(name for name in ("tensorboard", "trackio") if name in tracked.INSTALLED)

FLAGS = ("scripts/train.py", *TINY, "--image-size", 32, "--batch-size", 12, "--log-every", 1, "--max-steps")


@fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with TensorBoard and, if it is installed, Trackio."""
    folder = tmp_path_factory.mktemp("tracked")
    for name, shade in (("bus", 60), ("car", 160)):
        write_images(folder / "vehicles" / name, 20, shade)
    flags = (*FLAGS, 4, "--dataset", folder / "vehicles", "--track", ",".join(LOCAL))
    done = run_process(*flags, "--output-dir", folder / "photos", TRACKIO_DIR=str(folder / "trackio"))
    assert done.returncode == 0, done.stderr
    assert "Trackio" not in done.stdout
    return folder / "photos"


def test_tensorboard_has_the_numbers_of_metrics_jsonl(run: Path) -> None:
    expected = tracked.expected(run)
    assert {"train/loss", "train/lr", "train/images_per_second", "eval/top1"} <= {name for name, _, _ in expected}
    assert tracked.tensorboard(run) == [(name, step, float(np.float32(value))) for name, step, value in expected]


@tracked.needs_trackio
def test_trackio_has_the_numbers_of_metrics_jsonl_and_the_plots(run: Path) -> None:
    assert tracked.trackio(run.parent / "trackio") == tracked.expected(run)
    assert len(list((run.parent / "trackio" / "media").rglob("*.png"))) == len(list((run / "plots").glob("*.png")))


def test_trackers_have_the_settings_but_no_path_user_or_host(run: Path) -> None:
    (events,) = (run / "trackers" / "tensorboard").iterdir()
    for content in (events.read_bytes(), *(path.read_bytes() for path in (run.parent / "trackio").glob("*.db"))):
        for word in (b"label_smoothing", b"vehicles", b"test_resnet"):
            assert word in content
        for private in (str(run.parent), str(ROOT), socket.gethostname() * (len(socket.gethostname()) > 4)):
            assert not private or private.encode() not in content
        if len(getpass.getuser()) > 4:
            assert getpass.getuser().encode() not in content


def test_tensorboard_has_the_plots(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {f"plots/{path.stem}" for path in (run / "plots").glob("*.png")}
    assert "plots/curves" in names
    events = EventAccumulator(str(run / "trackers" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == names
    assert {event.step for event in events.Images("plots/curves")} == {4}


def test_a_tracker_that_is_added_on_resume_gets_all_steps(tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path / "run")
    assert run_process(*FLAGS, 3, *flags).returncode == 0
    assert not (tmp_path / "run" / "trackers").exists()
    done = run_process(*FLAGS, 5, *flags, "--track", "tensorboard")
    assert done.returncode == 0, done.stderr
    found = tracked.tensorboard(tmp_path / "run")
    assert [value[:2] for value in found] == [value[:2] for value in tracked.expected(tmp_path / "run")]
    assert {step for _, step, _ in found} == {1, 2, 3, 4, 5}


@mark.slow
def test_a_tracker_that_cannot_be_started_stops_a_new_run_before_its_first_step(tmp_path: Path) -> None:
    nobody = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_process(*FLAGS, 2, "--track", "wandb", "--output-dir", tmp_path / "run", **nobody)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"error: wandb cannot be started \(.*(?i:api.key).*\); fix that, or omit it from --track", error
    )
    assert not lines(tmp_path / "run" / "metrics.jsonl")


def test_a_tracker_that_cannot_be_started_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path / "run")
    assert run_process(*FLAGS, 2, *flags).returncode == 0
    (tmp_path / "run" / "trackers").mkdir()
    (tmp_path / "run" / "trackers" / "tensorboard").write_text("in the way")
    done = run_process(*FLAGS, 4, *flags, "--track", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"tensorboard failed .*File exists.*; (.*)", done.stderr) == [
        "the run continues without it, and logs the missing metrics when it ends or is resumed",
        "the missing metrics are in metrics.jsonl",
    ]
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


@mark.parametrize(
    ("listed", "message"),
    [
        (
            "wand",
            "--track wand: expected one or more of tensorboard, trackio, wandb, mlflow, separated by commas; did ",
        ),
        (
            "tensorboard,",
            "--track tensorboard,: expected one or more of tensorboard, trackio, wandb, mlflow, separated",
        ),
        ("wandb,wandb", "--track wandb,wandb lists wandb twice; list each tracker only once"),
        ("trackio", '--track trackio needs trackio, which is not installed; pip install "resnext-hub[trackio]"'),
    ],
)
def test_wrong_lists_are_refused_in_one_line(
    listed: str, message: str, tmp_path: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    code, _, err = command("train", *TINY, "--track", listed, "--output-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()
