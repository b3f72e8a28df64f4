"""Contenders that do the same work by turns, and the table of how they did."""

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

PEER_PACKAGES = ("torchvision", "onnxruntime", "openvino", "nncf", "simplejpeg")
"""Packages beyond those of every run whose version decides a figure."""


STEADY = 1.5
"""How many times as fast as another a round of the same contender may be before the table warns."""


def equal_in_flops(model: str) -> str | None:
    """Name a network without groups whose FLOPs are within a tenth of a variant's, if there is one."""
    variant = VARIANTS.get(model)
    if variant is None or variant.small_stem:
        return None
    resnet = dataclasses.replace(variant, name=f"resnet{variant.depth}", cardinality=1, base_width=64)
    plain = [resnet, *(other for other in VARIANTS.values() if other.cardinality == 1)]
    macs = complexity_of(variant).macs
    close = [other.name for other in plain if abs(complexity_of(other).macs / macs - 1) < 0.1]
    return next((name for name in close if name in timm.list_models()), None)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], float]
    """Does one round of it; gives images per second."""
    quality: str
    """What shows that it does the same work: its error, or its accuracy in exact counts."""
    ours: bool = False
    """Whether it is this package's; the others are its peers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a contender did."""

    name: str
    ours: bool
    quality: str
    images_per_second: tuple[float, ...]
    """One for each round."""

    @property
    def median(self) -> float:
        """Median images per second."""
        return statistics.median(self.images_per_second)

    def times(self, other: "Row") -> float:
        """Give how many times as fast as another this is: the median of the ratios of each round."""
        pairs = zip(self.images_per_second, other.images_per_second, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What a benchmark found, and on what."""

    kind: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """Give a Markdown table: speed, how many times as fast each of ours is, and the error."""
        ours = [row for row in self.rows if row.ours]
        head = ["", "images/s", *(f"{row.name}: times as fast" for row in ours), "quality"]
        lines = [head, ["---", *["---:"] * (1 + len(ours)), "---"]]
        for row in self.rows:
            ratios = ["" if row is mine else f"{mine.times(row):.2f}" for mine in ours]
            lines.append([row.name, f"{row.median:.1f}", *ratios, row.quality])
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        packages = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        rounds = len(self.rows[0].images_per_second) if self.rows else 0
        foot = [
            f"{self.machine['processor']}, {self.machine['threads']} threads; {packages}.",
            f"{settings}. Medians of {rounds} rounds, in each of which all took their turn; ratios are medians of the "
            "rounds' ratios.",
            *self.notes,
        ]
        spread = max((max(row.images_per_second) / min(row.images_per_second) for row in self.rows), default=1.0)
        if spread > STEADY:
            foot.append(
                f"The rounds of one contender differ by up to {spread:.1f} times: the machine did other work beside."
            )
        return text + "\n\n" + "\n".join(foot) + "\n"

    def to_json(self) -> str:
        """Give everything, with every round, as JSON."""
        rows = [
            {
                "name": row.name,
                "ours": row.ours,
                "quality": row.quality,
                "median_images_per_second": row.median,
                "images_per_second": row.images_per_second,
                "times_as_fast_as": {other.name: row.times(other) for other in self.rows if other is not row},
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


def hold_contest(
    kind: str,
    settings: Mapping[str, Any],
    contenders: Sequence[Contender],
    rounds: int,
    device: torch.device,
    notes: Sequence[str] = (),
) -> Contest:
    """Let all do their work by turns: one round that does not count, then `rounds` that do."""
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds + 1):
        for contender in contenders:
            rate = contender.run()
            if turn:
                rates[contender.name].append(rate)
                _logger.info("round %d of %d: %s, %.1f images/s", turn, rounds, contender.name, rate)
    rows = tuple(
        Row(name=c.name, ours=c.ours, quality=c.quality, images_per_second=tuple(rates[c.name])) for c in contenders
    )
    return Contest(kind=kind, settings=dict(settings), machine=machine_facts(device), rows=rows, notes=tuple(notes))


@contextlib.contextmanager
def in_its_own_process(title: str, build: Callable[..., Contender], *arguments: object) -> Iterator[Contender]:
    """Build a contender in a process of its own, so that its memory, caches and threads are nobody else's.

    Args:
        title: What an error calls it.
        build: A function at the top of a module.
        arguments: Its arguments, which are pickled.

    Raises:
        RequestError: If it does.
        RunError: If the process fails or dies.
    """
    # a server that has imported what all need, and computed nothing, makes them
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
            raise RunError(f"the process of a contender has died: {title}") from None
        if isinstance(answer, RunError):
            raise RunError(f"a contender has failed: {title}: {answer}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        name, quality, ours = answer_to()
        yield Contender(name=name, run=lambda: answer_to("a round"), quality=quality, ours=ours)
    finally:
        here.close()  # at which it ends, unless it is in the middle of something
        process.join(timeout=2)
        process.kill()


def _serve(pipe: Connection, threads: int, build: Callable[..., Contender], arguments: tuple[object, ...]) -> None:
    """Build a contender, and do a round whenever asked to, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends at Ctrl-C, and then this does
    torch.set_num_threads(threads)
    try:
        contender = build(*arguments)
        pipe.send((contender.name, contender.quality, contender.ours))
        with contextlib.suppress(EOFError):
            while True:
                pipe.recv()
                pipe.send(contender.run())
    except RequestError as error:
        pipe.send(error)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        pipe.send(RunError(one_line(error)))


def images_per_second(work: Callable[[], object], images: int, device: torch.device) -> float:
    """Do work on a number of images; give how many a second that was, with what the device still had to do."""
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return images / (time.perf_counter() - begin)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Give what figures depend on: processor, threads, versions."""
    packages = dict(versions())
    for name in PEER_PACKAGES:
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
