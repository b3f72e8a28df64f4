"""Check training and inference on a GPU and measure them, in a few minutes; print a Markdown report.

    python scripts/gpu_report.py --output report.md

torch, timm and accelerate suffice for the measurements of the model. The checks of whole training runs also need
datasets and scikit-learn, and the loader is measured with simplejpeg if it is installed; what is missing is named in
the report. Exit code 1 means that a check failed. `--device cpu` runs the same checks on a CPU, with small images.

The file is long because its sections, which are independent of each other, share only `Report` and the small helpers.
"""

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import resnext_hub  # noqa: F401  # registers the variants
from resnext_hub.data.augment import Augmentation
from resnext_hub.data.transforms import TransformConfig
from resnext_hub.errors import one_line
from resnext_hub.inference.optimize import optimize
from resnext_hub.kernels.timing import ForwardTiming, casting, median_seconds
from resnext_hub.kernels.training_view import AUTOCAST, build_training_view, choose_factors
from resnext_hub.kernels.widths import choose_widths
from resnext_hub.machine import cores, processor_name, versions
from resnext_hub.models.input_config import InputConfig

ROOT = Path(__file__).resolve().parents[1]


class SkippedError(Exception):
    """A section cannot run here; the message says why."""


class FailedError(Exception):
    """A check failed; the message says how."""


@dataclass
class Report:
    """What the sections found."""

    device: torch.device
    model: str
    image_size: int
    batch_size: int
    sections: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self, title: str, section: Callable[["Report"], list[str]]) -> None:
        """Run a section; a failure is reported, and the others still run."""
        begin = time.perf_counter()
        try:
            lines = section(self)
        except SkippedError as reason:
            lines = [f"Skipped: {reason}."]
        except Exception as error:  # noqa: BLE001  # whatever a new machine raises belongs in its report
            self.failed.append(title)
            lines = [f"**Failed**: {type(error).__name__}: {one_line(error)[:300]}."]
        seconds = time.perf_counter() - begin
        self.sections.append("\n".join([f"## {title}", "", *lines, "", f"({seconds:.0f} s)"]))
        sys.stderr.write(f"{title}: {'failed' if title in self.failed else 'done'} in {seconds:.0f} s\n")

    def images(self, last: bool = True) -> torch.Tensor:
        """Return seeded images `(N, 3, H, W)` on the device, channels last or contiguous."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
        layout = torch.channels_last if last else torch.contiguous_format
        return images.to(self.device).contiguous(memory_format=layout)

    def build(self, last: bool = True) -> nn.Module:
        """Return the model with seeded random weights on the device, channels last or contiguous."""
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(self.model, num_classes=1000)
        layout = torch.channels_last if last else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    @property
    def precisions(self) -> list[str]:
        """Mixed precisions that the device has."""
        return ["no", "bf16", "fp16"] if self.device.type == "cuda" else ["no", "bf16"]

    @property
    def fast(self) -> str:
        """The precision of a training run on a GPU; on a CPU, float32 works everywhere."""
        return "bf16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, with numbers to the right."""
    return [f"| {' | '.join(cells)} |" for cells in ([*head], ["---", *["---:"] * (len(head) - 1)], *rows)]


def missing(*packages: str) -> list[str]:
    """Return which packages are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


# ---- whole training runs, in processes of their own


def command(report: Report, folder: Path, *flags: object) -> list[str]:
    """Return a training command on the bundled digits."""
    absent = missing("datasets", "sklearn")
    if absent:
        raise SkippedError(f"needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed")
    words: list[object] = [
        sys.executable, "-m", "resnext_hub", "train", "--model", "resnext26_g32", "--output-dir", folder,
        "--eval-every", 1000, "--no-calibrate", *flags,
    ]  # fmt: skip
    return [str(word) for word in words]


def environment(report: Report) -> dict[str, str]:
    """Return the environment of a training command."""
    own = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    return own | ({"ACCELERATE_USE_CPU": "true"} if report.device.type == "cpu" else {})


def train(report: Report, words: list[str]) -> str:
    """Run a training command to its end; return its output."""
    done = subprocess.run(words, env=environment(report), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return done.stdout + done.stderr


def training_runs(report: Report) -> list[str]:
    """Train with each precision and read what the record says."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for precision in report.precisions:
            folder = Path(scratch, precision)
            train(report, command(report, folder, "--max-steps", 30, "--mixed-precision", precision))
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            losses = [
                line["loss"]
                for line in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
                if "loss" in line
            ]
            if not losses[-1] < losses[0]:
                raise FailedError(f"{precision}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
            skipped = str(record["skipped_steps"])
            rows.append([precision, f"{losses[0]:.3f}", f"{losses[-1]:.3f}", skipped])
    return table(["precision", "first loss", "last loss", "skipped steps"], rows)


def resumed_run(report: Report) -> list[str]:
    """Kill a run between two checkpoints, resume it, and compare the weights bit for bit."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for precision in report.precisions:
            flags = ("--max-steps", 12, "--checkpoint-every", 5, "--mixed-precision", precision, "--deterministic")
            whole, killed = Path(scratch, f"{precision}-whole"), Path(scratch, f"{precision}-killed")
            train(report, command(report, whole, *flags))
            words = command(report, killed, *flags)
            process = subprocess.Popen(words, env=environment(report), stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while not list((killed / "checkpoints").glob("step-*5")) and process.poll() is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if "resum" not in train(report, words):
                raise FailedError(f"{precision}: the run did not resume")
            hashes = [
                hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
                for run in (whole, killed)
            ]
            if hashes[0] != hashes[1]:
                raise FailedError(f"{precision}: the resumed run ended with other weights")
            rows.append([precision, "equal", hashes[0][:16]])
    return table(["precision", "weights after a kill and a resume", "SHA-256"], rows)


def two_processes(report: Report) -> list[str]:
    """Start more processes than there are GPUs; they must be refused."""
    count = torch.cuda.device_count() if report.device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as scratch:
        words = command(report, Path(scratch, "run"), "--max-steps", 2)
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count + 1 if count else 2)]
        done = subprocess.run(words, env=environment(report), capture_output=True, text=True, check=False)
    if not count:
        if done.returncode:
            raise FailedError((done.stderr.strip().splitlines() or ["no output"])[-1])
        return ["Two processes on a CPU train."]
    refusals = [line for line in done.stderr.splitlines() if "processes were started" in line]
    if not done.returncode or not refusals:
        raise FailedError(f"{count + 1} processes on {count} GPU(s) were not refused by name")
    return [f"`{refusals[0].strip()}`"]


# ---- the model


def step_of(model: nn.Module, images: torch.Tensor, precision: str) -> Callable[[], None]:
    """Return a function that takes a training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = torch.arange(len(images), device=images.device) % 1000
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad()
        with casting(images.device, AUTOCAST[precision]):
            logits = model(images)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def training_steps(report: Report) -> list[str]:
    """Measure a training step: layout, precision, merged groups, compilation, and memory."""
    plain, last = report.images(last=False), report.images()
    work: dict[str, Callable[[], None]] = {
        "eager float32, contiguous": step_of(report.build(last=False).train(), plain, "no"),
        "eager float32, channels_last": step_of(report.build().train(), last, "no"),
    }
    for precision in report.precisions[1:]:
        work[f"eager {precision}, contiguous"] = step_of(report.build(last=False).train(), plain, precision)
        work[f"eager {precision}, channels_last"] = step_of(report.build().train(), last, precision)
    model = report.build()
    factors = choose_factors(model, last, "auto", report.fast)
    view = build_training_view(model, factors).train()
    work[f"training view ({report.fast}, {len(factors)} layers merged)"] = step_of(view, last, report.fast)
    compiled = build_training_view(report.build(), factors).train()
    compiled.compile(dynamic=False)
    work[f"training view, compiled ({report.fast})"] = step_of(compiled, last, report.fast)
    seconds = median_seconds(work, report.device, rounds=5)
    first = next(iter(seconds.values()))
    rows = []
    for name, step in work.items():
        memory = ""
        if report.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
        value = seconds[name]
        rows.append([name, f"{1000 * value:.1f}", f"{report.batch_size / value:.0f}", f"{first / value:.2f}", memory])
    return table(["training step", "ms", "images/s", "speedup", "peak GB, with all models"], rows)


def merged_widths(report: Report) -> list[str]:
    """Measure the grouped convolutions at each width to which their groups can be merged."""
    dtype = AUTOCAST[report.fast] or torch.float32
    model = report.build().eval().to(dtype)
    with torch.no_grad():
        choices = choose_widths(model, report.images().to(dtype), "measure", timing=ForwardTiming())
    rows = []
    for (shape, width), group in itertools.groupby(choices, key=lambda choice: (choice.input_shape, choice.width)):
        choice, *others = group
        times = ", ".join(f"{wide}: {value:.3f}" for wide, value in choice.milliseconds.items())
        more = f" and {len(others)} more" if others else ""
        size = " x ".join(map(str, shape))
        rows.append([f"{choice.name}{more}", size, str(width), str(choice.merged_width), times])
    return table(["layers", "input", "channels per group", "fastest", "milliseconds by channels per group"], rows)


def inference(report: Report) -> list[str]:
    """Compare ways to run the model, each with its error relative to float32."""
    images, model = report.images(), report.build().eval()
    fast = AUTOCAST[report.fast] or torch.float32
    short = str(fast).removeprefix("torch.")
    half, compiled = report.build().eval().to(fast), report.build().eval().to(fast)
    compiled.compile(dynamic=False)
    cast = images.to(fast)
    optimized = optimize(report.build().eval(), images)
    assert optimized.report is not None
    contiguous, plain = report.build(last=False).eval(), report.images(last=False)
    work: dict[str, Callable[[], torch.Tensor]] = {
        "timm, eager float32, contiguous": partial(contiguous, plain),
        "timm, eager float32, channels_last": partial(model, images),
        **({} if fast is torch.float32 else {f"timm, eager {short}, channels_last": partial(half, cast)}),
        f"timm, compiled {short}, channels_last": partial(compiled, cast),
        f"resnext_hub.optimize: {optimized.report.engine}, {optimized.report.dtype}": partial(optimized, images),
    }
    with torch.no_grad():
        reference = model(images)
        seconds = event_seconds(work, report.device)
        errors = {name: float((run().float() - reference).norm() / reference.norm()) for name, run in work.items()}
    first = next(iter(seconds.values()))
    rows = [
        [name, f"{1000 * value:.2f}", f"{report.batch_size / value:.0f}", f"{first / value:.2f}", f"{errors[name]:.1e}"]
        for name, value in seconds.items()
    ]
    return table(["forward pass", "ms", "images/s", "speedup", "error"], rows)


def event_seconds(
    work: dict[str, Callable[[], torch.Tensor]], device: torch.device, rounds: int = 10
) -> dict[str, float]:
    """Return the median seconds of functions, in turn: by events of the GPU, or by the clock on a CPU."""
    if device.type != "cuda":
        return median_seconds(work, device, rounds=rounds)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 2):
        for name, run in work.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if round_ > 1:
                seconds[name].append(begin.elapsed_time(end) / 1000)
    return {name: float(np.median(values)) for name, values in seconds.items()}


# ---- the loader


class Photos(Dataset[torch.Tensor]):
    """Augmented photographs of 500 x 375 pixels."""

    def __init__(self, image_size: int, decoder: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        self.row = {"bytes": buffer.getvalue(), "path": None}
        config = {"input_size": (3, image_size, image_size), "interpolation": "bicubic"}
        self.augment = Augmentation(TransformConfig(), InputConfig.resolve(config), decoder)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.augment(self.row).image


def loader(report: Report) -> list[str]:
    """Measure the loader with a worker for each core, and compare it with a training step."""
    step = step_of(build_training_view(report.build(), {}).train(), report.images(), report.fast)
    trained = report.batch_size / median_seconds({"step": step}, report.device, rounds=3)["step"]
    rows = []
    for decoder in ["pil"] if missing("simplejpeg") else ["simplejpeg", "pil"]:
        workers = min(cores(), 16)
        batches: Iterator[torch.Tensor] = iter(
            DataLoader(Photos(report.image_size, decoder), report.batch_size, num_workers=workers)
        )
        for _ in range(workers):
            next(batches)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 3:
            count += len(next(batches))
        rate = count / (time.perf_counter() - begin)
        rows.append([decoder, str(workers), f"{rate:.0f}", f"{rate / workers:.0f}", f"{rate / trained:.2f}"])
        del batches
    lines = table(["decoder", "workers", "images/s", "per worker", "relative to a training step"], rows)
    return lines + (["", "simplejpeg is not installed; pil is the reference."] if missing("simplejpeg") else [])


SECTIONS: dict[str, Callable[[Report], list[str]]] = {
    "Training with each precision": training_runs,
    "A killed run resumes bit for bit": resumed_run,
    "More processes than devices": two_processes,
    "Training step": training_steps,
    "Widths of merged groups": merged_widths,
    "Inference": inference,
    "Loader": loader,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="resnext_g32")
    parser.add_argument("--image-size", type=int, help="default: 224, or 64 on a CPU")
    parser.add_argument("--batch-size", type=int, help="default: 128, or 16 on a CPU")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="run only this section; can be repeated")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser


def main() -> int:
    """Run all sections, print the report, and return the exit code."""
    parser = build_parser()
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    device = torch.device(options.device)
    small = device.type == "cpu"
    report = Report(
        device=device,
        model=options.model,
        image_size=options.image_size or (64 if small else 224),
        batch_size=options.batch_size or (16 if small else 128),
    )
    begin = time.perf_counter()
    for title in options.only or SECTIONS:
        report.run(title, SECTIONS[title])
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = "\n\n".join(
        [
            "# GPU report",
            f"{processor_name(device)}, {cores()} CPU cores; {packages}. "
            f"{report.model} at {report.image_size} px, batch size {report.batch_size}. Medians; "
            f"{time.perf_counter() - begin:.0f} s in all.",
            *report.sections,
        ]
    )
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    if report.failed:
        sys.stderr.write(f"failed: {', '.join(report.failed)}\n")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
