"""What a person sees of a run: a bar per epoch on a terminal, and plain lines at a readable pace without one."""

import itertools
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from pytest import MonkeyPatch, approx, mark
from support import warm_start
from support.processes import ROOT, TINY

from resnext_hub.training import progress
from resnext_hub.training.progress import Progress, clock

Command = Callable[..., tuple[int, str, str]]

FLAGS = (*TINY, "--image-size", 32, "--batch-size", 48, "--lr", 0.02)


def on_terminal(*flags: object, columns: int) -> str:
    """Run a training command whose standard error is a terminal; return what is written to it."""
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (40, columns))
    words = [sys.executable, "scripts/train.py", *map(str, flags)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=other) as run:
        os.close(other)
        found = b""
        while True:
            try:
                some = os.read(main, 4096)
            except OSError:  # the other end is closed
                break
            if not some:
                break
            found += some
        assert run.wait() == 0, found.decode()
    os.close(main)
    return found.decode()


@mark.parametrize("columns", [160, 0])
def test_a_terminal_shows_a_bar_for_each_epoch_with_the_figures_of_the_run(tmp_path: Path, columns: int) -> None:
    flags = (*FLAGS, "--epochs", 2, "--eval-every", 1, "--log-every", 1, "--output-dir", tmp_path / "run")
    text = on_terminal(*flags, columns=columns)
    frames = re.split(r"[\r\n]", text)
    bars = [frame for frame in frames if re.match(r"epoch \d/2: +\d+ %\|", frame)]
    assert {bar[:9] for bar in bars} == {"epoch 1/2", "epoch 2/2"}
    figures = r"loss \d\.\d+, accuracy \d+\.\d %, lr [\d.e-]+, \d+ images/s, waiting \d+%, \d+:\d\d left"
    assert any(re.search(figures, bar) for bar in bars), bars[-3:]
    evaluations = re.findall(r"epoch [\d.]+, step \d+ of \d+: accuracy .*\(\d+:\d\d\)", text)
    assert len(evaluations) == 2
    assert ", best so far" in evaluations[0]


@mark.slow
def test_a_log_has_no_carriage_returns_and_at_most_one_line_a_second(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/train.py", *map(str, FLAGS), "--epochs", "14", "--eval-every", "7"]
    words += ["--log-every", "1", "--output-dir", str(tmp_path / "run")]
    times = []
    with warm_start.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            assert "\r" not in line
            if re.match(r"step \d+ of \d+: loss", line):
                times.append(time.monotonic())
        assert run.wait() == 0
    assert len(times) >= 2
    assert min(b - a for a, b in itertools.pairwise(times)) > 1


def test_lines_are_written_after_a_pause_and_average_the_epoch(monkeypatch: MonkeyPatch, caplog: object) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level("INFO")  # type: ignore[attr-defined]
    shown = Progress(steps=20, step=0, per_epoch=10, visible=True)
    for step in range(12):
        shown.advance()
        now[0] += 1
        shown.show(loss=step, top1=0.5, lr=0.1, speed=80, wait=0.02, seconds_left=125 - step)
    lines = caplog.text.splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert "step 5 of 20: loss 2.000, accuracy 50.0 %, lr 0.1, 80 images/s, waiting 2%, 2:01 left" in lines[0]
    assert "step 10 of 20: loss" in lines[1]


@mark.parametrize(("seconds", "words"), [(0, "0:00"), (65.4, "1:05"), (3599, "59:59"), (11220, "3 h 07 min")])
def test_durations_are_written_as_on_a_clock(seconds: float, words: str) -> None:
    assert clock(seconds) == words


def test_epochs_of_a_fractional_number_of_steps_have_whole_bars() -> None:
    shown = Progress(steps=45, step=0, per_epoch=22.45, visible=False)
    ends = []
    for _ in range(45):
        ends.append(shown._end)
        shown.advance()
    assert ends == [23] * 23 + [45] * 22
    assert Progress(steps=45, step=30, per_epoch=22.45, visible=False)._end == approx(45)


def test_a_run_ends_with_the_weakest_classes_and_the_next_commands(tmp_path: Path, command: Command) -> None:
    code, out, err = command("train", *FLAGS, "--max-steps", 20, "--output-dir", tmp_path / "a run")
    assert code == 0, err
    assert re.search(r"^best weights: step \d+ of 20 \(epoch [\d.]+\)$", out, re.MULTILINE)
    weakest = re.search(r"^lowest recall: (.*)$", out, re.MULTILINE)
    assert weakest is not None
    shown = [float(entry.split("(")[1].split()[0]) for entry in weakest[1].split(", ")]
    assert len(shown) == 5
    assert shown == sorted(shown)
    for line in ("classify images:  resnext-hub predict", "publish:          resnext-hub push"):
        assert f"{line} '{tmp_path / 'a run'}'" in out
