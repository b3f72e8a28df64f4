"""Predict what a run costs at a number of images, classes and processes, from constants measured on this machine.

Each constant is measured at one size, and the predictions are checked at others.
"""

import dataclasses
import io
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from resnext_hub.benchmark.comparison import STEADY
from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.machine import cores, processor_name, versions
from resnext_hub.models.complexity import complexity_of
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.settings import Range, check_fields
from resnext_hub.text import listing, printable

_logger = logging.getLogger(__name__)

PER_CLASS = 100
"""Images per class of the folders that predictions are checked with."""

PROBES = ((2_000, 10), (20_000, 10), (20_000, 2_000))
"""Images and classes of the folders that the constants are measured with."""

LINKS = 10_000
"""Hard links to a file; file systems allow 32,000 or more."""

COPIES = 4
"""Float32 numbers per parameter: the weight, its gradient, the optimizer's momentum, and the best weight so far."""

_START = """
import json, resource, sys, time
begin = time.perf_counter()
import accelerate, datasets, pyarrow.parquet, sklearn.model_selection
import resnext_hub.runs.train
from resnext_hub.data.splits import DataConfig, load_splits
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
imported, empty = time.perf_counter(), peak()
splits = load_splits(DataConfig(dataset=sys.argv[1], group_duplicates=False))
loaded, full, worked = time.perf_counter(), peak(), time.process_time()
def read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
from resnext_hub.data.decode import read_bytes
before = read()
for images in (splits.train, splits.eval):
    for index in range(len(images)):
        read_bytes(images.row(index))
print(json.dumps([imported - begin, loaded - imported, empty, full - empty, read() - before, worked]))
"""
"""Opens a dataset as a run does, and reads each image once."""

_REDUCE = """
import json, statistics, sys, time
import torch
from torch import distributed
rank, processes, file, rounds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
found = []
for count in map(int, sys.argv[5:]):
    gradients, times = torch.zeros(count), []
    for _ in range(rounds + 1):
        distributed.barrier()
        begin = time.perf_counter()
        distributed.all_reduce(gradients)
        times.append(time.perf_counter() - begin)
    found.append(statistics.median(times[1:]))
print(json.dumps(found))
distributed.destroy_process_group()
"""
"""Sums gradients over processes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Scaling prediction."""

    images: Annotated[int, Range(1, 10**12)] = 1_281_167
    """Number of images in the dataset, which has a folder for each class."""
    classes: Annotated[int, Range(2, 10**7)] = 1000
    """Number of classes in the dataset."""
    processes: Annotated[int, Range(1, 1 << 16)] = 8
    """Number of training processes, all on this machine."""
    image_bytes: Annotated[int, Range(1, 10**9)] = 110_000
    """Mean size of an image file, in bytes; 110,000 is the mean for ImageNet."""
    model: str = "resnext_g32"
    """Variant whose gradients are summed across the processes."""
    largest: Annotated[int, Range(1000, 10**7)] = 100_000
    """Number of images in the largest folder on which the predictions are checked; the two smaller folders contain a
    tenth and a hundredth of this number."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What was measured on this machine."""

    import_seconds: float
    import_bytes: float
    """Peak memory of a process that has imported everything, in bytes."""
    open_seconds: tuple[float, float, float]
    """Seconds to open a dataset: fixed, per image, and per class."""
    open_bytes: tuple[float, float, float]
    """The same for memory in bytes."""
    reduce_seconds: float
    """Seconds for each message of an all-reduce, whatever its size."""
    reduce_rate: float
    """Bytes per second that a process sends in an all-reduce."""
    cores: int
    waited: float
    """Time of a start over its CPU time; much more than 1 if other processes were running, or the disk was slow."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run costs."""

    start_seconds: float
    """Seconds to import everything and open the dataset; the first process of a host opens it for all of them."""
    memory_bytes: float
    """Memory of a process: imports, dataset and model state, without activations."""
    read_bytes: float
    """Bytes that a process reads per epoch."""
    reduce_seconds: float
    """Seconds to sum the gradients once."""


def predict(found: Constants, settings: Settings, parameters: int) -> Prediction:
    """Return what a run costs.

    Args:
        found: The constants of the machine.
        settings: The size of the run.
        parameters: Number of parameters of the model.
    """
    size = (1, settings.images, settings.classes)
    busy = max(1.0, settings.processes / found.cores)  # processes that wait for a core
    return Prediction(
        start_seconds=busy * found.import_seconds + float(np.dot(found.open_seconds, size)),
        memory_bytes=found.import_bytes + float(np.dot(found.open_bytes, size)) + 4 * COPIES * parameters,
        read_bytes=settings.images * settings.image_bytes / settings.processes,
        reduce_seconds=_reduce_seconds(found, settings.processes, 4 * parameters),
    )


def _reduce_seconds(found: Constants, processes: int, size: int) -> float:
    """Return the seconds of a ring all-reduce: 2 (P - 1) messages of a P-th of the gradients from each process."""
    if processes == 1:
        return 0.0
    busy = max(1.0, processes / found.cores)
    return busy * 2 * (processes - 1) * (found.reduce_seconds + size / processes / found.reduce_rate)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A prediction beside what was measured."""

    what: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


@dataclass(frozen=True, kw_only=True)
class Report:
    """Predictions, their checks, and the constants that they follow from."""

    settings: Settings
    machine: dict[str, Any]
    constants: Constants
    prediction: Prediction
    checks: tuple[Check, ...]

    def table(self) -> str:
        """Return two Markdown tables: the predictions, and their checks at sizes that this machine can measure."""
        found, settings = self.prediction, self.settings
        rows = [
            ("startup", f"{found.start_seconds:.1f} s"),
            ("memory per process, without activations", f"{found.memory_bytes / 1e6:,.0f} MB"),
            ("read per process and epoch", f"{found.read_bytes / 1e9:,.2f} GB"),
            ("all-reduce of the gradients, per step", f"{1000 * found.reduce_seconds:,.1f} ms"),
        ]
        lines = [f"| predicted | {settings.images:,} images, {settings.classes:,} classes, {settings.processes} "]
        lines[0] += f"process{'' if settings.processes == 1 else 'es'} |"
        lines += ["| --- | ---: |", *(f"| {what} | {value} |" for what, value in rows), ""]
        lines += ["| checked | predicted | measured | ratio |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {c.what} | {c.predicted:,.3g} | {c.measured:,.3g} | {c.ratio:.2f} |" for c in self.checks]
        worst = max((max(check.ratio, 1 / check.ratio) for check in self.checks), default=1.0)
        packages = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        opened = self.constants.open_seconds
        return "\n".join(
            [
                *lines,
                "",
                f"The predictions are within a factor of {worst:.2f} of the {len(self.checks)} measurements.",
                f"Constants: imports {self.constants.import_seconds:.1f} s and {self.constants.import_bytes / 1e6:.0f} "
                f"MB; {1e6 * opened[1]:.1f} us per image and {1e6 * opened[2]:.1f} us per class to open folders; "
                f"{self.constants.open_bytes[1]:.0f} bytes per image; all-reduce "
                f"{1e6 * self.constants.reduce_seconds:.0f} us per message and "
                f"{self.constants.reduce_rate / 1e9:.2f} GB/s.",
                f"{self.machine['processor']}, {self.constants.cores} cores; {packages}.",
                *([self._warning()] if self.constants.waited > STEADY else []),
                "",
            ]
        )

    def _warning(self) -> str:
        return (
            f"Warning: startup took {self.constants.waited:.1f}x its CPU time; other processes were probably running "
            "on this machine."
        )

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def measure(settings: Settings, rounds: int) -> Report:
    """Measure the constants, predict, and check the predictions at smaller sizes.

    Raises:
        RequestError: If the model is not a variant.
        RunError: If a measurement fails.
    """
    import torch

    if settings.model not in VARIANTS:
        raise RequestError(f"{setting('model', settings.model)} is not a variant; choose one of {listing(VARIANTS)}")
    parameters = complexity_of(VARIANTS[settings.model], num_classes=settings.classes).parameters
    with tempfile.TemporaryDirectory(prefix="resnext-hub-scale-") as aside:
        found = measure_constants(Path(aside), rounds)
        checks = [*_check_starts(Path(aside), found, settings, rounds), *_check_reduce(found, parameters, rounds)]
    return Report(
        settings=settings,
        machine={"processor": processor_name(torch.device("cpu")), "versions": versions()},
        constants=found,
        prediction=predict(found, settings, parameters),
        checks=tuple(checks),
    )


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a process measured that opened a folder; memory and files in bytes."""

    import_seconds: float
    open_seconds: float
    import_bytes: float
    open_bytes: float
    read_bytes: float
    cpu_seconds: float


def fit(sizes: Sequence[tuple[int, int]], costs: Sequence[float]) -> tuple[float, float, float]:
    """Return a fixed cost, one per image and one per class, none below 0, from costs at some sizes."""
    from scipy.optimize import nnls

    scale = np.array([1.0, *np.max(sizes, axis=0)])
    fixed, image, class_ = nnls(np.array([(1, *size) for size in sizes]) / scale, np.array(costs))[0] / scale
    return float(fixed), float(image), float(class_)


def measure_constants(aside: Path, rounds: int) -> Constants:
    """Measure the constants of this machine.

    Args:
        aside: An empty folder for files of the measurement.
        rounds: Measurements of each, of which the median is taken.

    Raises:
        RunError: If a measurement fails.
    """
    starts = [_start(aside, images, classes, rounds) for images, classes in PROBES]
    short, long = 1 << 10, 1 << 22
    latency, transfer = _reduce(2, [short, long], rounds)
    messages = 2 * max(1.0, 2 / cores())  # of two processes, see `_reduce_seconds`
    return Constants(
        import_seconds=statistics.median(start.import_seconds for start in starts),
        import_bytes=statistics.median(start.import_bytes for start in starts),
        open_seconds=fit(PROBES, [start.open_seconds for start in starts]),
        open_bytes=fit(PROBES, [start.open_bytes for start in starts]),
        reduce_seconds=latency / messages,
        reduce_rate=(4 * (long - short) / 2) / max((transfer - latency) / messages, 1e-9),
        cores=cores(),
        waited=statistics.median((start.import_seconds + start.open_seconds) / start.cpu_seconds for start in starts),
    )


def _check_starts(aside: Path, found: Constants, settings: Settings, rounds: int) -> Iterator[Check]:
    """Open folders of three sizes, and compare."""
    for images in (settings.largest // 100, settings.largest // 10, settings.largest):
        classes = max(2, images // PER_CLASS)
        start = _start(aside, images, classes, rounds)
        own = Settings(images=images, classes=classes, processes=1, image_bytes=len(_image()))
        expected = predict(found, own, parameters=0)
        name = f"{images:,} images, {classes:,} classes"
        seconds = start.import_seconds + start.open_seconds
        yield Check(what=f"{name}: startup, s", predicted=expected.start_seconds, measured=seconds)
        opened = expected.start_seconds - found.import_seconds
        yield Check(what=f"{name}: opening the dataset, s", predicted=opened, measured=start.open_seconds)
        megabytes = (start.import_bytes + start.open_bytes) / 1e6
        yield Check(what=f"{name}: memory, MB", predicted=expected.memory_bytes / 1e6, measured=megabytes)
        yield Check(what=f"{name}: read, MB", predicted=expected.read_bytes / 1e6, measured=start.read_bytes / 1e6)


def _check_reduce(found: Constants, parameters: int, rounds: int) -> Iterator[Check]:
    """Sum gradients over two and over four processes, and compare."""
    for processes in (2, 4):
        (seconds,) = _reduce(processes, [parameters], rounds)
        what = f"all-reduce of {4 * parameters / 1e6:.0f} MB across {processes} processes, ms"
        expected = _reduce_seconds(found, processes, 4 * parameters)
        yield Check(what=what, predicted=1000 * expected, measured=1000 * seconds)


def _start(aside: Path, images: int, classes: int, rounds: int) -> Start:
    """Open a folder of images in processes of their own; return the medians of what they measured."""
    folder = aside / f"{images}-{classes}"
    _write_folder(folder, images, classes)
    _logger.info("measuring startup with %d images in %d classes", images, classes)
    command = [sys.executable, "-c", _START, str(folder)]
    measured = [_outputs([command])[0] for _ in range(rounds)]
    shutil.rmtree(folder)
    return Start(
        **{
            field.name: statistics.median(values)
            for field, values in zip(dataclasses.fields(Start), zip(*measured, strict=True), strict=True)
        }
    )


def _reduce(processes: int, counts: Sequence[int], rounds: int) -> list[float]:
    """Return the median seconds to sum numbers of float32 values over processes of their own."""
    _logger.info("measuring the all-reduce across %d processes", processes)
    with tempfile.TemporaryDirectory(prefix="resnext-hub-scale-") as aside:
        words = [processes, f"{aside}/store", rounds, *counts]
        outputs = _outputs([[sys.executable, "-c", _REDUCE, *map(str, (rank, *words))] for rank in range(processes)])
    return [max(times) for times in zip(*outputs, strict=True)]


def _outputs(commands: Sequence[Sequence[str]]) -> list[list[float]]:
    """Run processes at the same time; return the JSON lists that they print.

    Raises:
        RunError: If one fails.
    """
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for words in commands]
    texts = [process.communicate() for process in started]
    for process, (_, err) in zip(started, texts, strict=True):
        if process.returncode:
            raise RunError(f"a measurement process failed: {printable((err.splitlines() or ['no output'])[-1])}")
    return [json.loads(out.splitlines()[-1]) for out, _ in texts]


def _image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _write_folder(folder: Path, images: int, classes: int) -> None:
    """Write class folders of hard links to a few files, which take no space."""
    originals: list[Path] = []
    for number in range(images):
        place = folder / f"class-{number % classes:07}" / f"image-{number:09}.jpeg"
        if number < classes:
            place.parent.mkdir(parents=True)
        if number % LINKS == 0:
            originals.append(place)
            place.write_bytes(_image())
        else:
            os.link(originals[-1], place)
