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
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.kernels.timing import Latency, latency_of
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
    one_image: Callable[[], list[float]] | None = None
    """Runs one round of single images and returns the seconds of each; None if that is not measured."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of one entry."""

    name: str
    ours: bool
    quality: str
    images_per_second: tuple[float, ...]
    """Throughput of each round."""
    latencies: tuple[tuple[float, ...], ...] = ()
    """Seconds of each single image in each round; empty if that is not measured."""

    @property
    def latency(self) -> Latency:
        """Percentiles of the time of a single image, over all rounds."""
        return latency_of([seconds for round_ in self.latencies for seconds in round_])

    def latency_ratio(self, baseline: "Result") -> float:
        """Return the time of a single image, relative to another entry: the median over rounds of that of medians."""
        pairs = zip(self.latencies, baseline.latencies, strict=True)
        return statistics.median(statistics.median(own) / statistics.median(other) for own, other in pairs)

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
        single = any(row.latencies for row in self.rows)
        latency = ["p50 ms", "p99 ms"] if single else []
        head = ["", "images/s", *(f"speedup of {row.name}" for row in ours), *latency, "quality"]
        lines = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
        for row in self.rows:
            speedups = ["" if row is own else f"{own.speedup(row):.2f}" for own in ours]
            times = [f"{row.latency.p50:.2f}", f"{row.latency.p99:.2f}"] if single else []
            lines.append([row.name, f"{row.median:.1f}", *speedups, *times, row.quality])
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        packages = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        rounds = len(self.rows[0].images_per_second) if self.rows else 0
        foot = [
            f"{self.machine['processor']}, {self.machine['threads']} threads; {packages}.",
            f"Settings: {settings}. Medians of {rounds} interleaved rounds; a speedup is the median over rounds of the "
            "ratio of throughputs.",
            *(["p50 and p99 are percentiles of the time of a single image, over all rounds."] if single else []),
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
        rows: list[dict[str, Any]] = [
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
        for content, row in zip(rows, self.rows, strict=True):
            if row.latencies:
                content["one_image_ms"] = dataclasses.asdict(row.latency)
                content["one_image_seconds"] = row.latencies
                content["one_image_time_over"] = {
                    other.name: row.latency_ratio(other) for other in self.rows if other is not row
                }
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
    latencies: dict[str, list[tuple[float, ...]]] = {entry.name: [] for entry in entries}
    for number in range(rounds + 1):
        for entry in entries:
            rate = entry.run()
            if number:
                rates[entry.name].append(rate)
                _logger.info("round %d/%d: %s, %.1f images/s", number, rounds, entry.name, rate)
            seconds = entry.one_image() if entry.one_image else []
            if number and seconds:
                latencies[entry.name].append(tuple(seconds))
    rows = tuple(
        Result(
            name=entry.name,
            ours=entry.ours,
            quality=entry.quality,
            images_per_second=tuple(rates[entry.name]),
            latencies=tuple(latencies[entry.name]),
        )
        for entry in entries
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
            raise RunError(f"the process of the benchmark entry {title} died") from None
        if isinstance(answer, RunError):
            raise RunError(f"the benchmark entry {title} failed: {answer}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        name, quality, ours, has_latency = answer_to()
        one_image = partial(answer_to, "one image") if has_latency else None
        yield Entry(name=name, run=partial(answer_to, "a round"), quality=quality, ours=ours, one_image=one_image)
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
        pipe.send((entry.name, entry.quality, entry.ours, entry.one_image is not None))
        with contextlib.suppress(EOFError):
            while True:
                measure = entry.one_image if pipe.recv() == "one image" else entry.run
                assert measure is not None  # it is only asked for if there is one
                pipe.send(measure())
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
