"""Time until a model is trained: our training command against timm's train.py and a bare loop, on the same images.

Each run is a process of its own, and all of its time counts: imports, data loading, evaluation and results. The target
is the mean accuracy of the first baseline. An entry that reaches it in less time is faster; one that misses it is not,
however little time it takes.
"""

import dataclasses
import json
import logging
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import yaml
from torch import nn

from resnext_hub.benchmark.comparison import machine_facts
from resnext_hub.benchmark.training import run_python
from resnext_hub.data.config import DataConfig
from resnext_hub.data.holdout import stratified_split
from resnext_hub.data.sources import BUNDLED, load_digits_table
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.kernels.timing import casting, median_seconds
from resnext_hub.kernels.training_view import AUTOCAST
from resnext_hub.machine import device_type, resolve_precision
from resnext_hub.models.resnext import VARIANTS, stock_architecture
from resnext_hub.runs.recipes import RECIPES, find_recipe
from resnext_hub.settings import Range, check_fields, shown
from resnext_hub.training.config import flat_fields

_logger = logging.getLogger(__name__)

INGREDIENTS = (
    ("progressive_size",),
    ("optimizer", "lr", "weight_decay"),
    ("alternating_flip",),
    ("ema",),
    ("label_smoothing",),
)
"""Settings of a recipe that `--ablation` resets to their defaults, one group at a time."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Time-to-accuracy benchmark."""

    dataset: str = BUNDLED
    """The bundled digits, or a folder with the subfolders train and validation, each of which has one subfolder of
    images per class."""
    model: str = "resnext_g32"
    """Variant of this package, as listed by `resnext-hub info`; it is trained from random weights."""
    image_size: Annotated[int, Range(2, IMAGE_SIZE)] = 32
    """Height and width of the images, in pixels."""
    recipe: str = "fast"
    """Recipe of our entry."""
    epochs: Annotated[float, Range(0, 10_000, above=True)] | None = None
    """Epochs of our entries; those of the recipe if not given."""
    ablation: bool = False
    """Also measure our entry with each ingredient of the recipe left out."""
    baseline_epochs: Annotated[int, Range(1, 10_000)] = 3
    """Epochs of the baselines."""
    baseline_lr: Annotated[float, Range(0, 1000, above=True)] = 2e-3
    """Peak learning rate of the baselines, which use AdamW."""
    baseline_warmup: Annotated[int, Range(0, 10_000)] = 1
    """Warmup epochs of timm's train.py, which accepts only whole numbers; the bare loop warms up for 30 % of its
    steps."""
    batch_size: Annotated[int, Range(2, 1 << 20)] = 64
    """Images per optimizer step of the baselines."""
    hflip: Annotated[float, Range(0, 1)] | None = None
    """Probability of a horizontal flip in training; if not given, 0 for digits and 0.5 otherwise."""
    timm_checkout: str | None = None
    """Checkout of pytorch-image-models at the installed timm version; its train.py is then the first baseline."""

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            find_recipe(self.recipe)
        except RequestError as error:
            raise RequestError(f"{setting('recipe', shown(self.recipe))} {error}") from error
        if self.model not in VARIANTS:
            raise RequestError(f"{self.model} is not a variant of this package; choose one of {', '.join(VARIANTS)}")
        if self.dataset != BUNDLED:
            for split in ("train", "validation"):
                if not Path(self.dataset, split).is_dir():
                    where = setting("dataset", self.dataset)
                    raise RequestError(f"{where}: expected a folder with a subfolder {split}")
        if self.timm_checkout is not None and not Path(self.timm_checkout, "train.py").is_file():
            raise RequestError(f"{setting('timm_checkout', self.timm_checkout)} contains no train.py")

    @property
    def flips(self) -> float:
        """Probability of a horizontal flip."""
        return (0.0 if self.dataset == BUNDLED else 0.5) if self.hflip is None else self.hflip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A way of training that is measured."""

    name: str
    train: Callable[[int], float]
    """Trains with a seed; returns the accuracy on the validation images."""
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The runs of a entry."""

    name: str
    ours: bool
    seconds: tuple[float, ...]
    """Time of each run."""
    accuracies: tuple[float, ...]
    """Accuracy of each run, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The runs of all entries; the first one is the baseline."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: tuple[Trained, ...]

    def table(self) -> str:
        """Return a Markdown table."""
        baseline = self.rows[0]
        target = statistics.fmean(baseline.accuracies)
        lines = [
            f"| | accuracy | reaches {100 * target:.2f} % | seconds | time relative to {baseline.name} |",
            "| --- | ---: | --- | ---: | ---: |",
        ]
        for row in self.rows:
            reached = "yes" if statistics.fmean(row.accuracies) >= target else "no"
            pairs = zip(row.seconds, baseline.seconds, strict=True)
            ratio = statistics.median(own / other for own, other in pairs)
            percent = mean_and_interval([100 * accuracy for accuracy in row.accuracies], 2)
            lines.append(
                f"| {row.name} | {percent} % | {reached} | {mean_and_interval(row.seconds, 1)} | {ratio:.2f} |"
            )
        runs = len(baseline.seconds)
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        packages = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        several = "" if runs == 1 else "s, with 95 % intervals (Student's t)"
        foot = [
            f"{self.machine['processor']}, {self.machine['threads']} threads; {packages}.",
            f"Settings: {settings}.",
            f"Means of {runs} interleaved run{several}, each with its own seed; the total time of each process is "
            "counted. Ratios are medians over seeds.",
        ]
        return "\n".join(lines) + "\n\n" + "\n".join(foot) + "\n"

    def to_json(self) -> str:
        """Return everything, with every run, as JSON."""
        return json.dumps({"kind": "time-to-accuracy"} | dataclasses.asdict(self), indent=2) + "\n"


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """Return the mean of values and, for two or more, half of its 95 % confidence interval, as text."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    free = len(values) - 1
    if not free:
        return mean
    from scipy.stats import t

    half = t.ppf(0.975, free) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def measure(settings: Settings, rounds: int) -> Report:
    """Train with every entry, in turn, once for each seed.

    Args:
        settings: What to train, and how.
        rounds: Number of seeds.

    Raises:
        RequestError: If timm has no equivalent of the model.
        RunError: If a run fails.
    """
    device = torch.device(device_type())
    with tempfile.TemporaryDirectory(prefix="resnext-hub-time-") as scratch:
        folder = Path(scratch)
        data = Path(settings.dataset).resolve()
        if settings.dataset == BUNDLED:
            data = folder / BUNDLED
            _write_digits(data)
        entries = _entries(settings, data, folder, device)
        runs: dict[str, list[tuple[float, float]]] = {entry.name: [] for entry in entries}
        for seed in range(rounds):
            for entry in entries:
                begin = time.perf_counter()
                accuracy = entry.train(seed)
                seconds = time.perf_counter() - begin
                runs[entry.name].append((seconds, accuracy))
                _logger.info(
                    "round %d/%d: %s, %.2f %% in %.1f s", seed + 1, rounds, entry.name, 100 * accuracy, seconds
                )
    rows = []
    for entry in entries:
        times, accuracies = zip(*runs[entry.name], strict=True)
        rows.append(Trained(name=entry.name, ours=entry.ours, seconds=times, accuracies=accuracies))
    shown = {name: value for name, value in vars(settings).items() if name != "timm_checkout"}
    return Report(settings=shown | {"hflip": settings.flips}, machine=machine_facts(device), rows=tuple(rows))


def _write_digits(folder: Path) -> None:
    """Write the bundled digits as PNG files in class folders, with the validation images that a run holds out."""
    table = load_digits_table()
    train, validation = stratified_split(np.array(table["label"]), DataConfig().eval_fraction, 0)
    for split, rows in (("train", train), ("validation", validation)):
        for row in rows:
            image, label = table[int(row)].values()
            path = folder / split / str(label) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image["bytes"])


def _entries(settings: Settings, data: Path, scratch: Path, device: torch.device) -> list[Entry]:
    precision = resolve_precision("auto", device.type)
    found = []
    last = _channels_last_is_faster(settings, device, precision)
    if settings.timm_checkout is not None:
        flags = ["--channels-last"] if last else []
        if precision != "no":
            flags += ["--amp", "--amp-dtype", {"bf16": "bfloat16", "fp16": "float16"}[precision]]
        found.append(
            Entry(
                name=" ".join(["timm train.py", *flags]),
                train=lambda seed: _train_timm(settings, data, scratch, device, flags, seed),
            )
        )
    found.append(Entry(name="bare loop", train=lambda seed: _train_bare(settings, data, device, precision, last, seed)))
    recipe = RECIPES[settings.recipe].settings
    rows: list[tuple[str, dict[str, Any]]] = [(f"ours, recipe {settings.recipe}", {})]
    if settings.ablation:
        known = flat_fields()
        for names in INGREDIENTS:
            if names[0] in recipe:
                without = {name: known[name].default for name in names if name in recipe}
                rows.append((f"ours, without {names[0].replace('_', ' ')}", without))
    for name, changes in rows:

        def train(seed: int, changes: dict[str, Any] = changes) -> float:
            return _train_ours(settings, data, scratch, changes, seed)

        found.append(Entry(name=name, train=train, ours=True))
    return found


def _channels_last_is_faster(settings: Settings, device: torch.device, precision: str) -> bool:
    """Return whether the baselines train faster in the channels_last memory format, by timing a few steps in each."""
    work: dict[str, Callable[[], object]] = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        model = timm.create_model(settings.model, num_classes=10).to(device).to(memory_format=layout)
        images = torch.zeros(settings.batch_size, 3, settings.image_size, settings.image_size, device=device)
        images = images.contiguous(memory_format=layout)

        def step(model: nn.Module = model, images: torch.Tensor = images) -> None:
            with casting(device, AUTOCAST[precision]):
                loss = model(images).float().square().mean()
            loss.backward()

        work[name] = step
    seconds = median_seconds(work, device, rounds=3)
    return seconds["channels_last"] < seconds["contiguous"]


def _train_ours(settings: Settings, data: Path, scratch: Path, changes: Mapping[str, Any], seed: int) -> float:
    """Train with our command; return the accuracy."""
    recipe = RECIPES[settings.recipe].settings
    values: dict[str, Any] = {"hflip": settings.flips}
    if recipe.get("progressive_size"):
        # at the same fraction of the full size as in the recipe, as far as the model accepts such images
        smaller = settings.image_size * recipe["progressive_size"] / recipe["image_size"]
        stride = 4 if VARIANTS[settings.model].small_stem else 32
        values["progressive_size"] = min(max(round(smaller), stride), settings.image_size)
    if settings.epochs is not None:
        values["epochs"] = settings.epochs
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        config = Path(output, "config.yaml")
        config.write_text(yaml.safe_dump(values | dict(changes)), encoding="utf-8")
        words: list[object] = [
            "-m", "resnext_hub", "train", "--recipe", settings.recipe, "--config", config, "--dataset", data,
            "--eval-split", "validation", "--model", settings.model, "--image-size", settings.image_size,
            "--threads", torch.get_num_threads(), "--seed", seed, "--output-dir", Path(output, "run"),
        ]  # fmt: skip
        run_python(words, Path(__file__).parents[2])
        record = json.loads(Path(output, "run", "record.json").read_text(encoding="utf-8"))
    return float(record["evaluation"]["top1"])


def _train_timm(
    settings: Settings, data: Path, scratch: Path, device: torch.device, flags: Sequence[str], seed: int
) -> float:
    """Train with timm's script; return the accuracy of its best epoch."""
    stock = stock_architecture(VARIANTS[settings.model])
    if stock is None:
        raise RequestError(
            f"{setting('timm_checkout')}: timm has no equivalent of {settings.model}; choose another {setting('model')}"
        )
    arguments = [f"{name}={value}" for name, value in stock.model_args.items()]
    classes = sum(entry.is_dir() for entry in (data / "train").iterdir())
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        words: list[object] = [
            "train.py", "--data-dir", data, "--train-split", "train", "--val-split", "validation",
            "--model", stock.name, *(["--model-kwargs", *arguments] if arguments else []), "--num-classes", classes,
            "--input-size", 3, settings.image_size, settings.image_size, "--crop-pct", 1.0,
            "--interpolation", "bilinear", "--train-interpolation", "bilinear", "--scale", 0.7, 1.0,
            "--hflip", settings.flips, "--color-jitter", 0, "--batch-size", settings.batch_size,
            "--opt", "adamw", "--lr", settings.baseline_lr, "--weight-decay", 0.05, "--sched", "cosine",
            "--sched-on-updates", "--warmup-epochs", settings.baseline_warmup, "--warmup-lr", 1e-5, "--min-lr", 0,
            "--cooldown-epochs", 0,
            "--epochs", settings.baseline_epochs, "--smoothing", 0.1, "--workers", 1, "--seed", seed,
            "--device", device.type, "--output", output, *flags,
        ]  # fmt: skip
        text = run_python(words, Path(settings.timm_checkout or ""))
    best = re.search(r"\*\*\* Best metric: ([\d.]+)", text)
    if best is None:
        raise RunError(f"{settings.timm_checkout}/train.py printed no best metric: {text[-300:]!r}")
    return float(best[1]) / 100


def _train_bare(
    settings: Settings, data: Path, device: torch.device, precision: str, channels_last: bool, seed: int
) -> float:
    """Train with the bare loop; return the accuracy."""
    request = {
        "data": str(data), "model": settings.model, "size": settings.image_size, "batch": settings.batch_size,
        "epochs": settings.baseline_epochs, "lr": settings.baseline_lr, "hflip": settings.flips, "seed": seed,
        "device": device.type, "precision": precision, "channels_last": channels_last,
    }  # fmt: skip
    script = Path(__file__).with_name("bare_loop.py")
    text = run_python([script, json.dumps(request)], Path(__file__).parents[2])
    return float(text.strip().splitlines()[-1])
