"""What tests read of run folders, and a run that is killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import warm_start
from support.processes import ROOT


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(found: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in found]


def kill_at(step: int, folder: Path, *flags: object) -> None:
    """Start a run, and kill it with SIGKILL as soon as it has logged a step."""
    words = [sys.executable, "scripts/train.py", *map(str, flags), "--output-dir", str(folder)]
    with warm_start.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        samples = folder / "samples-0.jsonl"
        while time.monotonic() < deadline and run.poll() is None:
            if samples.is_file() and samples.read_text().count("\n") >= step:
                break
            time.sleep(0.005)
        assert run.poll() is None, "the run ended before it could be killed"
        run.send_signal(signal.SIGKILL)
