"""Optimizer steps, beside their peers.

Ours is the training command itself, with all that it does in a step, in a process of its own, on images of a folder;
timm's train.py, if its checkout is given, likewise on the same folder, with the same augmentation. The bare loops have
their images in memory, and do nothing but forward, backward and the optimizer's step.
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

from resnext_hub.benchmark.contest import Contender, Contest, equal_in_flops, hold_contest, images_per_second
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.kernels.training_view import AUTOCAST, build_training_view, choose_factors
from resnext_hub.machine import device_type, resolve_precision
from resnext_hub.models.resnext import VARIANTS, stock_architecture
from resnext_hub.settings import Range, check_fields

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str = "resnext_g32"
    """A variant of this package; its weights are seeded, as no figure depends on them."""
    equal_flops: str | None = None
    """A network without groups, in a bare loop beside it; if not given, one of about as many FLOPs, if there is one."""
    image_size: Annotated[int, Range(2, IMAGE_SIZE)] = 64
    """Height and width of the images in pixels."""
    batch_size: Annotated[int, Range(2, 1 << 20)] = 64
    """Images of an optimizer step."""
    steps: Annotated[int, Range(4, 1_000_000)] = 16
    """Steps of a round; the first quarter of them does not count."""
    compile: bool = False
    """Measure --compile and a compiled bare loop as well; compiling takes a minute or more in each."""
    timm_checkout: str | None = None
    """Checkout of pytorch-image-models at the installed version, whose train.py is measured as well."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model not in VARIANTS:
            raise RequestError(f"{self.model}: there is no such variant; there are {', '.join(VARIANTS)}")
        if self.equal_flops is not None and self.equal_flops.partition(".")[0] not in timm.list_models():
            raise RequestError(f"{self.equal_flops}: timm knows no such network")
        if self.timm_checkout is not None and not Path(self.timm_checkout, "train.py").is_file():
            raise RequestError(f"--timm-checkout {self.timm_checkout}: there is no train.py in it")


def measure(settings: Settings, rounds: int) -> Contest:
    """Let all contenders do the work by turns.

    Raises:
        RequestError: If a network does not take such images.
    """
    device = torch.device(device_type())
    settings = replace(settings, equal_flops=settings.equal_flops or equal_in_flops(settings.model))
    for name in filter(None, (settings.model, settings.equal_flops)):
        _check_size(name, settings.image_size)
    fast = resolve_precision("auto", device.type)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_images(folder / "images", settings)
        contenders = _ours(settings, folder, device, fast)
        contenders += _bare_loops(settings, device, fast)
        contenders += _timm_scripts(settings, folder, device, fast)
        notes = (
            "Error: of the first step's gradient on noise, all parameters together, relative to eager float32 in "
            "contiguous format.",
        )
        shown = {name: value for name, value in vars(settings).items() if name != "timm_checkout"}
        return hold_contest("training", shown, contenders, rounds, device, notes)


def _check_size(model: str, image_size: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(model).eval()
        try:
            network(torch.empty(2, 3, image_size, image_size))
        except (AssertionError, RuntimeError) as error:
            raise RequestError(f"{model} does not take --image-size {image_size}: {one_line(error)}") from error


def _write_images(folder: Path, settings: Settings) -> None:
    """Write random images in class folders, as many as the steps of a round take."""
    generator = np.random.default_rng(0)
    side = (settings.image_size, settings.image_size)
    for split, count in (("train", settings.steps * settings.batch_size), ("validation", settings.batch_size)):
        for index in range(count):
            path = folder / split / f"class{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            blocks = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize(side, Image.Resampling.BICUBIC).save(path, quality=90)


def _ours(settings: Settings, folder: Path, device: torch.device, fast: str) -> list[Contender]:
    example = torch.zeros(settings.batch_size, 3, settings.image_size, settings.image_size, device=device)
    example = example.contiguous(memory_format=torch.channels_last)
    rows: list[tuple[str, tuple[str, ...], str]] = [("ours", (), "auto"), ("ours, --merge-groups off", (), "off")]
    if settings.compile:
        rows.append(("ours, --compile", ("--compile",), "auto"))
    contenders = []
    for name, flags, merge in rows:
        network = _network(settings.model, device, channels_last=True)
        form = build_training_view(network, choose_factors(network, example, merge, fast))
        quality = f"error {_gradient_error(form, settings, device, fast):.3f}"
        if fast != "no":
            quality += f", in float32 {_gradient_error(form, settings, device, 'no'):.3f}"

        def run(flags: tuple[str, ...] = (*flags, "--merge-groups", merge)) -> float:
            return _run_ours(settings, folder, flags)

        contenders.append(Contender(name=name, run=run, quality=quality, ours=name == "ours"))
    return contenders


def _run_ours(settings: Settings, folder: Path, flags: Sequence[str]) -> float:
    """Train for the steps of a round with the command that everybody types; give images per second."""

    quarter = settings.steps // 4
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words: list[object] = [
            "-m", "resnext_hub", "train", "--dataset", folder / "images", "--model", settings.model,
            "--image-size", settings.image_size, "--batch-size", settings.batch_size, "--max-steps", settings.steps,
            "--lr", 0.01, "--warmup-epochs", 0, "--log-every", quarter, "--eval-every", 1000,
            "--threads", torch.get_num_threads(), *flags, "--output-dir", Path(output, "run"),
        ]  # fmt: skip
        _run(words, Path(__file__).parents[2])
        lines = [json.loads(line) for line in Path(output, "run", "metrics.jsonl").read_text("utf-8").splitlines()]
    rates: list[float] = [line["images_per_second"] for line in lines if "images_per_second" in line][1:4]
    return len(rates) / sum(1 / rate for rate in rates)


def _bare_loops(settings: Settings, device: torch.device, fast: str) -> list[Contender]:
    rows = [
        ("bare loop, eager float32", settings.model, "no", False),
        (f"bare loop, {fast}, channels_last", settings.model, fast, False),
    ]
    if settings.equal_flops is not None:
        rows.append((f"bare loop, {fast}, channels_last, {settings.equal_flops}", settings.equal_flops, fast, False))
    if settings.compile:
        rows.insert(2, (f"bare loop, {fast}, channels_last, compiled", settings.model, fast, True))
    contenders = []
    for name, model, precision, compiled in rows:
        network = _network(model, device, channels_last=precision != "no" or fast == "no")
        quality = "another network"
        if model == settings.model:
            quality = f"error {_gradient_error(network, settings, device, precision):.3f}"
        run = _bare_loop(network, settings, device, precision, compiled)
        contenders.append(Contender(name=name, run=run, quality=quality))
    return contenders


def _bare_loop(
    network: nn.Module, settings: Settings, device: torch.device, precision: str, compiled: bool
) -> Callable[[], float]:
    """Give what takes half a round's steps, the first of them uncounted, and says how many images a second it did."""
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.01, weight_decay=1e-4, momentum=0.9)
    images, labels = _batch(settings, device, next(network.parameters()))
    if compiled:
        network.compile(dynamic=False)
    steps = max(settings.steps // 2, 2)

    def step() -> None:
        optimizer.zero_grad()
        _loss(network, images, labels, precision).backward()
        optimizer.step()

    def take_steps() -> None:
        for _ in range(steps):
            step()

    def run() -> float:
        step()
        return images_per_second(take_steps, steps * len(images), device)

    return run


def _timm_scripts(settings: Settings, folder: Path, device: torch.device, fast: str) -> list[Contender]:
    if settings.timm_checkout is None:
        return []
    contenders = []
    best = ["--channels-last"]
    if fast != "no":
        best += ["--amp", "--amp-dtype", {"bf16": "bfloat16", "fp16": "float16"}[fast]]
    for name, flags in (("timm train.py, default flags", []), (f"timm train.py, {' '.join(best)}", best)):

        def run(flags: list[str] = flags) -> float:
            return _run_timm(settings, folder, device, flags)

        contenders.append(Contender(name=name, run=run, quality="as the bare loop with these flags"))
    return contenders


def _run_timm(settings: Settings, folder: Path, device: torch.device, flags: Sequence[str]) -> float:
    """Train for an epoch, which is the steps of a round, with timm's script; give images per second."""
    stock = stock_architecture(VARIANTS[settings.model])
    if stock is None:
        raise RequestError(f"--timm-checkout: timm has no network such as {settings.model}")
    arguments = [f"{name}={value}" for name, value in stock.model_args.items()]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words: list[object] = [
            "train.py", "--data-dir", folder / "images", "--train-split", "train", "--val-split", "validation",
            "--model", stock.name, *(["--model-kwargs", *arguments] if arguments else []),
            "--num-classes", CLASSES, "--input-size", 3, settings.image_size, settings.image_size,
            "--batch-size", settings.batch_size, "--device", device.type, "--epochs", 1, "--warmup-epochs", 0,
            "--lr", 0.01, "--color-jitter", 0, "--log-interval", 1, "--output", output, *flags,
        ]  # fmt: skip
        text = _run(words, Path(settings.timm_checkout or ""))
    seconds = [float(found) for found in re.findall(r"Train: .*?Time: *([\d.]+)s", text)]
    counted = seconds[settings.steps // 4 :]
    if not counted:
        raise RunError(f"{settings.timm_checkout}/train.py has said no times of its steps: {text[-300:]!r}")
    return settings.batch_size * len(counted) / sum(counted)


def _run(words: Sequence[object], cwd: Path) -> str:
    """Run a Python process with as many threads as this one; give what it has printed."""

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
        last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
        raise RunError(f"{words[0]} {words[1]} of the benchmark failed: {last[0]}")
    return done.stdout


def _network(model: str, device: torch.device, channels_last: bool) -> nn.Module:
    """Build a network with weights from a seed, whose branches count a tenth where they would begin as zeros.

    Gradients show them then; with more of them, rounding is all that is left of a gradient of noise.
    """
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(model, num_classes=CLASSES)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.1)
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if channels_last else network


def _batch(settings: Settings, device: torch.device, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give seeded images `(N, 3, H, W)` and labels `(N,)`, the images in the memory format of a parameter."""

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size, generator=generator)
    labels = torch.randint(0, CLASSES, (settings.batch_size,), generator=generator)
    last = parameter.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout), labels.to(device)


def _loss(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> torch.Tensor:
    dtype = AUTOCAST[precision]
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        logits = network(images)
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def _gradient_error(form: nn.Module, settings: Settings, device: torch.device, precision: str) -> float:
    """Give the relative difference of a first step's gradient from that of eager float32, contiguous."""

    def gradient(network: nn.Module, precision: str) -> torch.Tensor:
        images, labels = _batch(settings, device, next(network.parameters()))
        loss = _loss(network.train(), images, labels, precision)
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, list(network.parameters()))])

    exact = gradient(_network(settings.model, device, channels_last=False), "no")
    return float((gradient(form, precision) - exact).norm() / exact.norm())
