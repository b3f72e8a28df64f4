"""Build a model for an engine, torch or OpenVINO, with the settings that are fastest on this machine."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import nn

from resnext_hub import machine
from resnext_hub.kernels.timing import ForwardTiming, latencies, median_seconds
from resnext_hub.kernels.widths import MARGIN, LayerChoice, Merge, merge_layers

_logger = logging.getLogger(__name__)

Compute = Callable[[torch.Tensor], torch.Tensor]

Objective = Literal["throughput", "latency"]
"""What is optimized: images/s of a batch, or the time of a single image."""


class Request(NamedTuple):
    """What to build."""

    engine: Literal["torch", "openvino"]
    dtype: torch.dtype
    merge: Merge
    at_once: int | Literal["measure"]
    compile: bool
    calibration: torch.Tensor | None
    objective: Objective


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that takes batches of one size."""

    compute: Compute
    """Maps `at_once` images to logits."""
    model: nn.Module
    """The model with merged groups, in torch."""
    at_once: int
    engine: str
    layers: tuple[LayerChoice, ...] = ()
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of a forward pass on a CPU."""
    milliseconds_at_once: dict[int, float] = field(default_factory=dict)
    """Median time on the example by batch size; empty if only one was tried."""
    milliseconds_by_threads: dict[int, float] = field(default_factory=dict)
    """Median time of an image by number of threads; empty if only one was tried."""


_Build = Callable[[int], Built]
"""Builds a model for a batch size."""


def build_fastest(model: nn.Module, example: torch.Tensor, request: Request) -> Built:
    """Build what has the highest throughput on the example, or the lowest latency for its first image.

    Args:
        model: The model in float32, with folded batch norms; it may be changed.
        example: Images `(N, C, H, W)`.
        request: What to build.
    """
    if request.objective == "latency":
        return _fastest_threads(model, example[:1], request)
    layers, build = _prepare(model, example, request)
    built = build(request.at_once) if request.at_once != "measure" else _fastest_batch_size(build, example)
    return replace(built, layers=layers)


def in_parts(compute: Compute, at_once: int, images: torch.Tensor) -> torch.Tensor:
    """Compute the logits of any number of images: fewer are padded to the batch size, more are split."""
    parts = []
    for part in torch.split(images, at_once):
        missing = at_once - len(part)
        padded = nn.functional.pad(part, (0,) * 7 + (missing,)) if missing else part
        parts.append(compute(padded)[: len(part)].float())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _fastest_batch_size(build: _Build, example: torch.Tensor) -> Built:
    """Build for the batch size that is fastest on the example."""
    count = len(example)
    parts = (1, 2, 4, 8) if example.device.type == "cpu" else (1,)
    sizes = dict.fromkeys(ceil(count / part) for part in parts)
    built = {
        size: build(size) for size in sizes if size > 1 or size == count
    }  # a batch size of 1 is hardly ever fastest
    if len(built) == 1:
        return built[count]
    runs = {str(size): partial(in_parts, found.compute, size, example) for size, found in built.items()}
    seconds = {int(size): value for size, value in median_seconds(runs, example.device, rounds=5).items()}
    best = min(seconds, key=seconds.__getitem__)
    chosen = built[best if seconds[best] < MARGIN * seconds[count] else count]
    return replace(chosen, milliseconds_at_once={size: round(1000 * value, 4) for size, value in seconds.items()})


def _fastest_threads(model: nn.Module, image: torch.Tensor, request: Request) -> Built:
    """Build for the number of threads, 1 or all, that classifies an image faster; each with widths of its own."""
    everything = torch.get_num_threads()
    counts = sorted({1, everything}) if image.device.type == "cpu" else [everything]
    built = {}
    for threads in counts:
        with _using_threads(threads):
            layers, build = _prepare(copy.deepcopy(model), image, request)
            built[threads] = replace(build(1), layers=layers)
    if len(built) == 1:
        return built[everything]
    runs = {str(threads): partial(found.compute, image) for threads, found in built.items()}
    times = {int(threads): round(latency.p50, 4) for threads, latency in latencies(runs, image.device).items()}
    return replace(built[min(times, key=times.__getitem__)], milliseconds_by_threads=times)


@contextlib.contextmanager
def _using_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def _prepare(model: nn.Module, example: torch.Tensor, request: Request) -> tuple[tuple[LayerChoice, ...], _Build]:
    """Merge groups in place; return the choice for each layer, and what builds the model."""
    if request.engine == "openvino":
        return _prepare_openvino(model, example, request.dtype, request.merge, request.calibration)
    return _prepare_torch(model, example, request.dtype, request.merge, request.compile)


def _prepare_torch(
    model: nn.Module, example: torch.Tensor, dtype: torch.dtype, merge: Merge, compile: bool
) -> tuple[tuple[LayerChoice, ...], _Build]:
    def cast(images: torch.Tensor) -> torch.Tensor:
        return images.to(dtype, memory_format=torch.channels_last)

    def build(at_once: int) -> Built:
        compute, compiled = compile_frozen(model, cast(example[:at_once])) if compile else (model, False)
        threads = torch.get_num_threads()

        def run(images: torch.Tensor) -> torch.Tensor:
            with _using_threads(threads):
                return compute(cast(images))

        return Built(compute=run, model=model, at_once=at_once, engine="torch.compile" if compiled else "torch eager")

    model.to(dtype).to(memory_format=torch.channels_last)
    return merge_layers(model, cast(example), merge, ForwardTiming(packed=compile)), build


def _prepare_openvino(
    model: nn.Module, example: torch.Tensor, dtype: torch.dtype, merge: Merge, calibration: torch.Tensor | None
) -> tuple[tuple[LayerChoice, ...], _Build]:
    if find_spec("openvino") is None or find_spec("nncf") is None:
        raise ModuleNotFoundError('openvino is not installed; pip install "resnext-hub[openvino]"', name="openvino")
    machine.disable_telemetry()
    from resnext_hub.kernels.openvino import OpenVinoModel, OpenVinoTiming, convert

    model.float()
    layers = merge_layers(model, example, merge, OpenVinoTiming(model, example, dtype, calibration))
    converted = convert(model, example, calibration)

    def build(at_once: int) -> Built:
        part = converted.clone()
        part.reshape([at_once, *example.shape[1:]])
        return Built(compute=OpenVinoModel(part, dtype), model=model, at_once=at_once, engine="OpenVINO")

    return layers, build


def compile_frozen(model: nn.Module, example: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """Compile with frozen weights; the global setting for it is needed only in the first call, and then restored."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    def run(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(images)
        return found

    # the compiler caches only a few results per code object, so models and batch sizes must not share one
    run.__code__ = run.__code__.replace(co_name=f"run_{id(model)}_{len(example)}")
    compiled = torch.compile(run, dynamic=False)
    with config.patch(freezing=True), machine.quiet_compilers():
        try:
            compiled(example)
        except (BackendCompilerFailed, RuntimeError) as error:
            _logger.warning("torch.compile failed, so the model runs in eager mode: %s", str(error).splitlines()[0])
            return model, False
    return compiled, True
