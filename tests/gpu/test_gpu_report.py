"""The report of a GPU machine: every section passes, here on a CPU and on a GPU where there is one."""

from pathlib import Path

import torch
from pytest import mark
from support.processes import ROOT, run_interpreter

SCRIPT = ROOT / "scripts" / "gpu_report.py"

TITLES = [
    "Training with each precision",
    "A killed run resumes bit for bit",
    "More processes than devices",
    "Training step",
    "Widths of merged groups",
    "Inference",
    "Loader",
]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@mark.slow
@mark.parametrize("device", DEVICES)
def test_every_section_passes_and_is_in_the_report(device: str, tmp_path: Path) -> None:
    small = ("--model", "resnext26_g32", "--image-size", 32, "--batch-size", 4) if device == "cpu" else ()
    words = (SCRIPT, "--device", device, "--output", tmp_path / "report.md", *small)
    done = run_interpreter(*words, timeout=480)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report.md").read_text()
    assert done.stdout == text
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == TITLES
    assert "Skipped" not in text
    assert "Failed" not in text


HIDING = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
hidden = ("datasets", "simplejpeg")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else found(name, *rest)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script that does not find some packages."""


@mark.slow
def test_a_missing_package_is_named_and_skips_only_what_needs_it() -> None:
    small = ("--model", "resnext26_g32", "--image-size", 32, "--batch-size", 4)
    sections = ("--only", TITLES[0], "--only", TITLES[-1])
    done = run_interpreter("-c", HIDING, SCRIPT, "--device", "cpu", *sections, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped: needs datasets, which is not installed." in done.stdout
    assert "| pil |" in done.stdout
    assert "| simplejpeg |" not in done.stdout
    assert "simplejpeg is not installed" in done.stdout


@mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_named() -> None:
    done = run_interpreter(SCRIPT, "--device", "cuda")
    assert done.returncode == 2
    assert "torch sees no GPU; use --device cpu" in done.stderr
