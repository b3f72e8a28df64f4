"""Throughput of training with frequent checkpoints, against training without.

Each entry runs the training command in its own process, and is timed by the clock: the command's own images per second
exclude the time for checkpoints.
"""

import json
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from resnext_hub.benchmark.comparison import Comparison, Entry, compare
from resnext_hub.benchmark.training import run_python, write_images
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.machine import device_type
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.settings import Range, check_fields

NEVER = 1_000_000
"""Steps between the checkpoints of a run that writes only its last one."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checkpoint benchmark."""

    model: str = "resnext_g32"
    """Variant of this package, as listed by `resnext-hub info`; its training starts from random weights."""
    image_size: Annotated[int, Range(2, IMAGE_SIZE)] = 224
    """Height and width of the images, in pixels."""
    batch_size: Annotated[int, Range(2, 1 << 20)] = 32
    """Images per optimizer step."""
    every: Annotated[int, Range(1, 10_000)] = 5
    """Number of steps between checkpoints."""
    intervals: Annotated[int, Range(1, 10_000)] = 5
    """Number of checkpoints in the measured part of each round, which begins at one checkpoint and ends just before
    another."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model not in VARIANTS:
            raise RequestError(
                f"{setting('model', self.model)} is not a variant of this package; choose one of {', '.join(VARIANTS)}"
            )


def measure(settings: Settings, rounds: int) -> Comparison:
    """Measure both entries."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images", 16 * settings.batch_size, settings.batch_size, settings.image_size)
        entries = [
            Entry(
                name=f"a checkpoint every {settings.every} steps",
                run=lambda: _run(settings, folder, settings.every),
                quality="the same weights",
                ours=True,
            ),
            Entry(name="no checkpoint", run=lambda: _run(settings, folder, NEVER), quality=""),
        ]
        return compare("checkpoints", dict(vars(settings)), entries, rounds, torch.device(device_type()), ())


def _run(settings: Settings, folder: Path, every: int) -> float:
    """Train for one round; return images/s from the step of the first checkpoint to that of the last one."""
    first, last = settings.every, settings.every * (settings.intervals + 1)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        run = Path(output, "run")
        words: list[object] = [
            "-m", "resnext_hub", "train", "--dataset", folder / "images", "--model", settings.model,
            "--image-size", settings.image_size, "--batch-size", settings.batch_size, "--max-steps", last,
            "--lr", 0.01, "--warmup-epochs", 0, "--log-every", settings.every, "--eval-every", NEVER,
            "--checkpoint-every", every, "--threads", torch.get_num_threads(), "--output-dir", run,
        ]  # fmt: skip
        clock = _Clock(run / "metrics.jsonl")
        threading.Thread(target=clock.watch, daemon=True).start()
        try:
            run_python(words, Path(__file__).parents[2])
        finally:
            clock.stopped.set()
    if not {first, last} <= clock.seen.keys():
        raise RunError(f"the run wrote no metrics for step {first} or {last}")
    return (last - first) * settings.batch_size / (clock.seen[last] - clock.seen[first])


class _Clock:
    """When each step appeared in a metrics.jsonl file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[int, float] = {}
        self.stopped = threading.Event()

    def watch(self) -> None:
        """Read the file every few milliseconds until `stopped` is set."""
        while not self.stopped.wait(0.005):
            text = self.path.read_text("utf-8") if self.path.is_file() else ""
            for line in text.splitlines(keepends=True)[len(self.seen) :]:
                if line.endswith("\n"):
                    self.seen.setdefault(json.loads(line)["step"], time.monotonic())
