"""Time grouped convolutions at each width to which their groups can be merged."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Protocol

import torch
from torch import nn

from resnext_hub.kernels.merged import MergedConv2d, merge_conv, merge_factors

ROUNDS = 15
"""Interleaved measurements of each candidate, of which the median is taken."""


WARMUP, CALLS = 3, 10
"""Calls for single images in each round, untimed and timed."""


@dataclass(frozen=True)
class Layer:
    """A grouped convolution of a model, and an input with the right shape, type and layout but any values."""

    name: str
    conv: nn.Conv2d
    input: torch.Tensor

    @property
    def width(self) -> int:
        """Input channels per group."""
        return self.conv.in_channels // self.conv.groups


class Timing(Protocol):
    """A way to time layers."""

    @property
    def key(self) -> str:
        """Identifies the way of timing in the cache."""

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of a mixed-precision pass; None without mixed precision."""

    def times(self, layers: Sequence[Layer]) -> list[dict[int, float]]:
        """Return the median milliseconds of each layer by width."""


@dataclass(frozen=True)
class ForwardTiming:
    """Times the forward pass of torch, with weights merged in advance."""

    packed: bool = False
    """Time as in a model compiled with frozen weights, which on a CPU are packed in the kernel's own order."""
    autocast = None

    @property
    def key(self) -> str:
        """Identifies the way of timing in the cache."""
        return "forward, packed" if self.packed else "forward"

    def times(self, layers: Sequence[Layer]) -> list[dict[int, float]]:
        """Return the median milliseconds of each layer by width."""

        def merged(layer: Layer, conv: nn.Conv2d, factor: int) -> nn.Module:
            wide = merge_conv(conv, factor)
            return Packed(wide, layer.input) if self.packed and _can_be_packed(layer) else wide

        return [_times_by_width(layer, partial(merged, layer), _forward) for layer in layers]


def _can_be_packed(layer: Layer) -> bool:
    """Return whether torch.compile packs a layer's weights."""
    if layer.input.device.type != "cpu" or isinstance(layer.conv.padding, str):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return layer.input.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Packed(nn.Module):
    """A convolution as torch.compile runs it on a CPU: oneDNN's kernel with weights packed in advance.

    Otherwise oneDNN packs them in each pass, which takes longer for wider groups.

    Args:
        conv: The convolution, on the CPU.
        x: An input of the right shape and type.
    """

    def __init__(self, conv: nn.Conv2d, x: torch.Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.shape, x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.conv.bias, *self.shape, "none", [], ""
        )
        return y


@dataclass(frozen=True)
class TrainingTiming:
    """Times the forward and backward pass of torch, including the merging of the weights."""

    autocast: torch.dtype | None = None
    """Type of a mixed-precision pass; None without mixed precision."""

    @property
    def key(self) -> str:
        """Identifies the way of timing in the cache."""
        return f"forward and backward, autocast {self.autocast}"

    def times(self, layers: Sequence[Layer]) -> list[dict[int, float]]:
        """Return the median milliseconds of each layer by width."""

        def step(conv: nn.Module, x: torch.Tensor) -> object:
            x = x.requires_grad_()
            with torch.enable_grad(), casting(x.device, self.autocast):
                y = conv(x)
            return torch.autograd.grad(y, [x, *conv.parameters()], torch.ones_like(y))

        return [_times_by_width(layer, MergedConv2d, step) for layer in layers]


def median_seconds(
    work: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS, *, warm: bool = False
) -> dict[str, float]:
    """Time functions in interleaved rounds, after a warmup round; return the median seconds of each.

    Args:
        work: Functions to time, by name.
        device: The device that they use.
        rounds: Number of timed rounds.
        warm: Call a function once more before each measurement, because threads of another engine may still spin.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in work.items():
            if warm:
                run()
            _synchronize(device)
            begin = time.perf_counter()
            run()
            _synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of a single image, in milliseconds."""

    p50: float
    """Median."""
    p99: float
    """99th percentile."""

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f} ms, p99 {self.p99:.2f} ms"


def latency_of(seconds: Sequence[float]) -> Latency:
    """Return the percentiles of times in seconds."""
    ordered = sorted(seconds)
    return Latency(p50=1000 * statistics.median(ordered), p99=1000 * ordered[ceil(0.99 * len(ordered)) - 1])


def latencies(work: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 10) -> dict[str, Latency]:
    """Time functions that classify one image, in interleaved rounds of several calls each.

    Args:
        work: Functions to time, by name.
        device: The device that they use.
        rounds: Number of rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            seconds[name] += call_seconds(run, device)
    return {name: latency_of(values) for name, values in seconds.items()}


def call_seconds(run: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of each of several calls, after a warmup: what ran before used the caches and threads."""
    seconds = []
    for call in range(WARMUP + CALLS):
        _synchronize(device)
        begin = time.perf_counter()
        run()
        _synchronize(device)
        if call >= WARMUP:
            seconds.append(time.perf_counter() - begin)
    return seconds


def _times_by_width(
    layer: Layer,
    merged: Callable[[nn.Conv2d, int], nn.Module],
    work: Callable[[nn.Module, torch.Tensor], object],
) -> dict[int, float]:
    generator = torch.Generator(layer.input.device).manual_seed(0)  # leaves the global generators unchanged
    x = torch.empty_like(layer.input).normal_(generator=generator)
    candidates = {factor * layer.width: merged(layer.conv, factor) for factor in merge_factors(layer.conv)}
    runs = {str(width): partial(work, conv, x) for width, conv in candidates.items()}
    seconds = median_seconds(runs, x.device)
    return {int(width): round(1000 * value, 4) for width, value in seconds.items()}


@torch.no_grad()
def _forward(conv: nn.Module, x: torch.Tensor) -> object:
    return conv(x)


@contextlib.contextmanager
def casting(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to a type; None disables autocast."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
