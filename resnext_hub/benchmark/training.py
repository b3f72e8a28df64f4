"""Throughput of training against baselines.

Our entries run the training command in its own process, with everything that it does in a step, on a folder of images.
timm's train.py, if a checkout is given, runs in the same way on the same folder with the same augmentation. The bare
loops hold their images in memory and only do forward, backward and the optimizer step.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from resnext_hub.benchmark.comparison import Comparison, Entry, compare, equal_flops_model, images_per_second
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.kernels.training_view import AUTOCAST, build_training_view, choose_factors
from resnext_hub.machine import device_type, resolve_precision
from resnext_hub.models.resnext import VARIANTS, stock_architecture
from resnext_hub.settings import Range, check_fields

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Training benchmark."""

    model: str = "resnext_g32"
    """Variant of this package, as listed by `resnext-hub info`; its training starts from random weights."""
    equal_flops: str | None = None
    """Model without grouped convolutions, to measure in an additional bare loop (default: one with about the same
    FLOPs, if there is one)."""
    image_size: Annotated[int, Range(2, IMAGE_SIZE)] = 64
    """Height and width of the images, in pixels."""
    batch_size: Annotated[int, Range(2, 1 << 20)] = 64
    """Images per optimizer step."""
    steps: Annotated[int, Range(4, 1_000_000)] = 16
    """Optimizer steps per round, 4 or more; the first quarter is warmup and is not measured."""
    compile: bool = False
    """Also measure `train --compile` and a compiled bare loop; each takes a minute or more to compile."""
    timm_checkout: str | None = None
    """Checkout of pytorch-image-models at the installed timm version; if given, its train.py is measured as well."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model not in VARIANTS:
            raise RequestError(f"{self.model} is not a variant of this package; choose one of {', '.join(VARIANTS)}")
        if self.equal_flops is not None and self.equal_flops.partition(".")[0] not in timm.list_models():
            raise RequestError(f"{self.equal_flops} is not a timm model; `timm.list_models()` lists all of them")
        if self.timm_checkout is not None and not Path(self.timm_checkout, "train.py").is_file():
            raise RequestError(f"{setting('timm_checkout', self.timm_checkout)} contains no train.py")


def measure(settings: Settings, rounds: int) -> Comparison:
    """Measure all entries.

    Raises:
        RequestError: If a model does not take images of that size.
    """
    device = torch.device(device_type())
    settings = replace(settings, equal_flops=settings.equal_flops or equal_flops_model(settings.model))
    for name in filter(None, (settings.model, settings.equal_flops)):
        _check_size(name, settings.image_size)
    fast = resolve_precision("auto", device.type)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images", settings.steps * settings.batch_size, settings.batch_size, settings.image_size)
        entries = _ours(settings, folder, device, fast)
        entries += _bare_loops(settings, device, fast)
        entries += _timm_scripts(settings, folder, device, fast)
        notes = (
            "Error: relative error of the first step's gradient on noise, over all parameters; the reference is eager "
            "float32 in contiguous memory format.",
        )
        shown = {name: value for name, value in vars(settings).items() if name != "timm_checkout"}
        return compare("training", shown, entries, rounds, device, notes)


def _check_size(model: str, image_size: int) -> None:
    with torch.device("meta"):
        probe = timm.create_model(model).eval()
        try:
            probe(torch.empty(2, 3, image_size, image_size))
        except (AssertionError, RuntimeError) as error:
            raise RequestError(
                f"{model} does not accept {setting('image_size', image_size)}: {one_line(error)}"
            ) from error


def write_images(folder: Path, train: int, validation: int, image_size: int) -> None:
    """Write numbers of random images of a size in pixels to the class folders of two splits."""
    generator = np.random.default_rng(0)
    side = (image_size, image_size)
    for split, count in (("train", train), ("validation", validation)):
        for index in range(count):
            path = folder / split / f"class{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            blocks = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize(side, Image.Resampling.BICUBIC).save(path, quality=90)


def _ours(settings: Settings, folder: Path, device: torch.device, fast: str) -> list[Entry]:
    example = torch.zeros(settings.batch_size, 3, settings.image_size, settings.image_size, device=device)
    example = example.contiguous(memory_format=torch.channels_last)
    rows: list[tuple[str, tuple[str, ...], str]] = [("ours", (), "auto"), ("ours, --merge-groups off", (), "off")]
    if settings.compile:
        rows.append(("ours, --compile", ("--compile",), "auto"))
    entries = []
    for name, flags, merge in rows:
        model = _seeded_model(settings.model, device, channels_last=True)
        view = build_training_view(model, choose_factors(model, example, merge, fast))
        quality = f"error {_gradient_error(view, settings, device, fast):.3f}"
        if fast != "no":
            quality += f", in float32 {_gradient_error(view, settings, device, 'no'):.3f}"

        def run(flags: tuple[str, ...] = (*flags, "--merge-groups", merge)) -> float:
            return _run_ours(settings, folder, flags)

        entries.append(Entry(name=name, run=run, quality=quality, ours=name == "ours"))
    return entries


def _run_ours(settings: Settings, folder: Path, flags: Sequence[str]) -> float:
    """Train for one round with the train command; return images/s."""
    quarter = settings.steps // 4
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words: list[object] = [
            "-m", "resnext_hub", "train", "--dataset", folder / "images", "--model", settings.model,
            "--image-size", settings.image_size, "--batch-size", settings.batch_size, "--max-steps", settings.steps,
            "--lr", 0.01, "--warmup-epochs", 0, "--log-every", quarter, "--eval-every", 1000,
            "--threads", torch.get_num_threads(), *flags, "--output-dir", Path(output, "run"),
        ]  # fmt: skip
        run_python(words, Path(__file__).parents[2])
        lines = [json.loads(line) for line in Path(output, "run", "metrics.jsonl").read_text("utf-8").splitlines()]
    rates: list[float] = [line["images_per_second"] for line in lines if "images_per_second" in line][1:4]
    return len(rates) / sum(1 / rate for rate in rates)


def _bare_loops(settings: Settings, device: torch.device, fast: str) -> list[Entry]:
    rows = [
        ("bare loop, eager float32", settings.model, "no", False),
        (f"bare loop, {fast}, channels_last", settings.model, fast, False),
    ]
    if settings.equal_flops is not None:
        rows.append((f"bare loop, {fast}, channels_last, {settings.equal_flops}", settings.equal_flops, fast, False))
    if settings.compile:
        rows.insert(2, (f"bare loop, {fast}, channels_last, compiled", settings.model, fast, True))
    entries = []
    for name, architecture, precision, compiled in rows:
        model = _seeded_model(architecture, device, channels_last=precision != "no" or fast == "no")
        quality = "different model"
        if architecture == settings.model:
            quality = f"error {_gradient_error(model, settings, device, precision):.3f}"
        run = _bare_loop(model, settings, device, precision, compiled)
        entries.append(Entry(name=name, run=run, quality=quality))
    return entries


def _bare_loop(
    model: nn.Module, settings: Settings, device: torch.device, precision: str, compiled: bool
) -> Callable[[], float]:
    """Return a function that takes half a round's steps after a warmup step and returns images/s."""
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=1e-4, momentum=0.9)
    images, labels = _batch(settings, device, next(model.parameters()))
    if compiled:
        model.compile(dynamic=False)
    steps = max(settings.steps // 2, 2)

    def step() -> None:
        optimizer.zero_grad()
        _loss(model, images, labels, precision).backward()
        optimizer.step()

    def take_steps() -> None:
        for _ in range(steps):
            step()

    def run() -> float:
        step()
        return images_per_second(take_steps, steps * len(images), device)

    return run


def _timm_scripts(settings: Settings, folder: Path, device: torch.device, fast: str) -> list[Entry]:
    if settings.timm_checkout is None:
        return []
    entries = []
    best = ["--channels-last"]
    if fast != "no":
        best += ["--amp", "--amp-dtype", {"bf16": "bfloat16", "fp16": "float16"}[fast]]
    for name, flags in (("timm train.py, default flags", []), (f"timm train.py, {' '.join(best)}", best)):

        def run(flags: list[str] = flags) -> float:
            return _run_timm(settings, folder, device, flags)

        entries.append(Entry(name=name, run=run, quality="same numerics as the bare loop with these flags"))
    return entries


def _run_timm(settings: Settings, folder: Path, device: torch.device, flags: Sequence[str]) -> float:
    """Train for an epoch, which is one round, with timm's script; return images/s."""
    stock = stock_architecture(VARIANTS[settings.model])
    if stock is None:
        raise RequestError(
            f"{setting('timm_checkout')}: timm has no equivalent of {settings.model}; choose another {setting('model')}"
        )
    arguments = [f"{name}={value}" for name, value in stock.model_args.items()]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words: list[object] = [
            "train.py", "--data-dir", folder / "images", "--train-split", "train", "--val-split", "validation",
            "--model", stock.name, *(["--model-kwargs", *arguments] if arguments else []),
            "--num-classes", CLASSES, "--input-size", 3, settings.image_size, settings.image_size,
            "--batch-size", settings.batch_size, "--device", device.type, "--epochs", 1, "--warmup-epochs", 0,
            "--lr", 0.01, "--color-jitter", 0, "--log-interval", 1, "--output", output, *flags,
        ]  # fmt: skip
        text = run_python(words, Path(settings.timm_checkout or ""))
    seconds = [float(found) for found in re.findall(r"Train: .*?Time: *([\d.]+)s", text)]
    counted = seconds[settings.steps // 4 :]
    if not counted:
        raise RunError(f"{settings.timm_checkout}/train.py printed no step times: {text[-300:]!r}")
    return settings.batch_size * len(counted) / sum(counted)


def run_python(words: Sequence[object], cwd: Path) -> str:
    """Run Python with as many threads as this process has; return its output.

    Raises:
        RunError: If it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise RunError(f"the benchmark's `python {words[0]} {words[1]} …` failed: {last[0]}")
    return done.stdout


def _seeded_model(architecture: str, device: torch.device, channels_last: bool) -> nn.Module:
    """Build a model with seeded random weights, with 0.1 in place of zero-initialized batch-norm weights.

    Zeros would hide the branches from the gradient; with much more than 0.1, rounding dominates the gradient of noise.
    """
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(architecture, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.1)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _batch(settings: Settings, device: torch.device, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeded images `(N, 3, H, W)` in the memory format of a parameter, and labels `(N,)`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size, generator=generator)
    labels = torch.randint(0, CLASSES, (settings.batch_size,), generator=generator)
    last = parameter.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout), labels.to(device)


def _loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> torch.Tensor:
    dtype = AUTOCAST[precision]
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def _gradient_error(model: nn.Module, settings: Settings, device: torch.device, precision: str) -> float:
    """Return the relative error of the first step's gradient; the reference is eager float32, contiguous."""

    def gradient(model: nn.Module, precision: str) -> torch.Tensor:
        images, labels = _batch(settings, device, next(model.parameters()))
        loss = _loss(model.train(), images, labels, precision)
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, list(model.parameters()))])

    reference = gradient(_seeded_model(settings.model, device, channels_last=False), "no")
    return float((gradient(model, precision) - reference).norm() / reference.norm())
