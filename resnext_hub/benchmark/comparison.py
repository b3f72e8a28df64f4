"""Interleaved measurement of the entries of a benchmark, and the table of results."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.machine import cores, processor_name, versions
from resnext_hub.models.complexity import complexity_of
from resnext_hub.models.resnext import VARIANTS

_logger = logging.getLogger(__name__)

BASELINE_PACKAGES = ("torchvision", "onnxruntime", "openvino", "nncf", "simplejpeg")
"""Packages beyond those of a training run whose versions affect the results."""

STEADY = 1.5
"""Ratio of the fastest to the slowest round of an entry above which the table warns."""


def equal_flops_model(model: str) -> str | None:
    """Return a model without grouped convolutions whose FLOPs are within 10 % of a variant's, or None."""
    variant = VARIANTS.get(model)
    if variant is None or variant.small_stem:
        return None
    resnet = dataclasses.replace(variant, name=f"resnet{variant.depth}", cardinality=1, base_width=64)
    plain = [resnet, *(other for other in VARIANTS.values() if other.cardinality == 1)]
    macs = complexity_of(variant).macs
    close = [other.name for other in plain if abs(complexity_of(other).macs / macs - 1) < 0.1]
    return next((name for name in close if name in timm.list_models()), None)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One implementation that a benchmark measures."""

    name: str
    run: Callable[[], float]
    """Runs one round and returns its throughput in images/s."""
    quality: str
    """Evidence that it does the same work: its error, or its accuracy in exact counts."""
    ours: bool = False
    """Whether it is from this package; the others are baselines."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of one entry."""

    name: str
    ours: bool
    quality: str
    images_per_second: tuple[float, ...]
    """Throughput of each round."""

    @property
    def median(self) -> float:
        """Median throughput in images/s."""
        return statistics.median(self.images_per_second)

    def speedup(self, baseline: "Result") -> float:
        """Return the speedup over another entry: the median over rounds of the ratio of throughputs."""
        pairs = zip(self.images_per_second, baseline.images_per_second, strict=True)
        return statistics.median(own / other for own, other in pairs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of a benchmark, with the settings, machine and versions that they hold for."""

    kind: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: tuple[Result, ...]
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """Return a Markdown table: throughput, the speedup of each of our entries over each row, and the error."""
        ours = [row for row in self.rows if row.ours]
        head = ["", "images/s", *(f"speedup of {row.name}" for row in ours), "quality"]
        lines = [head, ["---", *["---:"] * (1 + len(ours)), "---"]]
        for row in self.rows:
            speedups = ["" if row is own else f"{own.speedup(row):.2f}" for own in ours]
            lines.append([row.name, f"{row.median:.1f}", *speedups, row.quality])
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        packages = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        rounds = len(self.rows[0].images_per_second) if self.rows else 0
        foot = [
            f"{self.machine['processor']}, {self.machine['threads']} threads; {packages}.",
            f"Settings: {settings}. Medians of {rounds} interleaved rounds; a speedup is the median over rounds of the "
            "ratio of throughputs.",
            *self.notes,
        ]
        spread = max((max(row.images_per_second) / min(row.images_per_second) for row in self.rows), default=1.0)
        if spread > STEADY:
            foot.append(
                f"Warning: the rounds of one entry differ by up to {spread:.1f}x; other processes were probably "
                "running on this machine."
            )
        return text + "\n\n" + "\n".join(foot) + "\n"

    def to_json(self) -> str:
        """Return everything, with every round, as JSON."""
        rows = [
            {
                "name": row.name,
                "ours": row.ours,
                "quality": row.quality,
                "median_images_per_second": row.median,
                "images_per_second": row.images_per_second,
                "speedup_over": {other.name: row.speedup(other) for other in self.rows if other is not row},
            }
            for row in self.rows
        ]
        content = {
            "kind": self.kind,
            "settings": self.settings,
            "machine": self.machine,
            "rows": rows,
            "notes": self.notes,
        }
        return json.dumps(content, indent=2) + "\n"


def compare(
    kind: str,
    settings: Mapping[str, Any],
    entries: Sequence[Entry],
    rounds: int,
    device: torch.device,
    notes: Sequence[str] = (),
) -> Comparison:
    """Measure all entries in interleaved rounds, after one warmup round.

    Args:
        kind: Name of the benchmark.
        settings: Its settings, for the report.
        entries: What to measure.
        rounds: Number of measured rounds; every entry runs once in each.
        device: Device of the work.
        notes: Sentences for below the table.
    """
    rates: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for number in range(rounds + 1):
        for entry in entries:
            rate = entry.run()
            if number:
                rates[entry.name].append(rate)
                _logger.info("round %d/%d: %s, %.1f images/s", number, rounds, entry.name, rate)
    rows = tuple(
        Result(name=e.name, ours=e.ours, quality=e.quality, images_per_second=tuple(rates[e.name])) for e in entries
    )
    return Comparison(kind=kind, settings=dict(settings), machine=machine_facts(device), rows=rows, notes=tuple(notes))


@contextlib.contextmanager
def in_own_process(title: str, build: Callable[..., Entry], *arguments: object) -> Iterator[Entry]:
    """Build an entry in a separate process, so entries do not share memory, caches or threads.

    Args:
        title: Name of the entry in errors.
        build: A function at the top level of a module.
        arguments: Its arguments, which must be picklable.

    Raises:
        RequestError: If `build` raises it.
        RunError: If the process fails or dies.
    """
    # the fork server imports the module once and computes nothing, so each process starts clean and fast
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([build.__module__])
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, torch.get_num_threads(), build, arguments))
    process.start()
    there.close()

    def answer_to(*question: object) -> Any:
        try:
            for part in question:
                here.send(part)
            answer = here.recv()
        except (EOFError, OSError):
            raise RunError(f"the process of benchmark entry {title} died") from None
        if isinstance(answer, RunError):
            raise RunError(f"a benchmark entry failed: {title}: {answer}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        name, quality, ours = answer_to()
        yield Entry(name=name, run=lambda: answer_to("a round"), quality=quality, ours=ours)
    finally:
        here.close()  # ends the process unless it is busy
        process.join(timeout=2)
        process.kill()


def _serve(pipe: Connection, threads: int, build: Callable[..., Entry], arguments: tuple[object, ...]) -> None:
    """Build an entry, and run a round per request until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which closes the pipe
    torch.set_num_threads(threads)
    try:
        entry = build(*arguments)
        pipe.send((entry.name, entry.quality, entry.ours))
        with contextlib.suppress(EOFError):
            while True:
                pipe.recv()
                pipe.send(entry.run())
    except RequestError as error:
        pipe.send(error)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        pipe.send(RunError(one_line(error)))


def images_per_second(work: Callable[[], object], images: int, device: torch.device) -> float:
    """Run work on a number of images and return its throughput; pending work of the device is included."""
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return images / (time.perf_counter() - begin)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what results depend on: processor, cores, threads, and versions of this package and its baselines."""
    packages = dict(versions())
    for name in BASELINE_PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor_name(device),
        "device": device.type,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "versions": packages,
    }


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
