"""From a trained network to the fastest one that computes the same, measured on the machine at hand.

What is done keeps the function: batch norm is folded into the convolution before it, neighbouring groups are merged
to the width that is fastest here for each layer's shape, weights and activations take the asked precision and memory
format, and the whole is compiled with its weights frozen. What it costs in accuracy is measured in the same call,
against the network as it was given, in float32.
"""

import contextlib
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnext_hub.machine import resolve_precision
from resnext_hub.models.merged import dense_form, grouped_convolutions, merge_factors

_logger = logging.getLogger(__name__)

ROUNDS = 5
"""Interleaved measurements of each candidate; their median counts."""

MARGIN = 0.97
"""A merged width is taken if its time is below this part of the grouped one's: less is noise."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One grouped convolution."""

    name: str
    input_shape: tuple[int, ...]
    width: int
    """Channels of a group as the network has it."""
    merged_width: int
    """Channels of a group as it is computed now."""
    milliseconds: dict[int, float]
    """Median time by width; empty where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class OptimizationReport:
    """What was done, what it gains and what it costs."""

    layers: tuple[LayerReport, ...]
    folded_batch_norms: int
    dtype: str
    compiled: bool
    speedup: float
    """Time of the given network on the example, eager in float32, over that of the fast one."""
    milliseconds: float
    """Median time of the fast network on the example."""
    max_error: float
    """Greatest difference of a logit from the float32 reference."""
    relative_error: float
    """Norm of the difference over that of the reference's logits."""
    same_predictions: float
    """Part of the example's pictures that get the same class, 0 to 1."""


class OptimizedModel(nn.Module):
    """A fast network: float32 pictures `(N, C, H, W)` of any N to float32 logits `(N, classes)`.

    It computes batches of the example's size: fewer pictures are filled up, more are cut.
    """

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor], batch_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._network = network
        self._batch_size, self._dtype = batch_size, dtype
        self.report: OptimizationReport | None = None
        """What was done; set by `optimize`."""

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map pictures `(N, C, H, W)` to logits `(N, classes)`."""
        parts = []
        for part in torch.split(images, self._batch_size):
            missing = self._batch_size - len(part)
            filled = nn.functional.pad(part, (0,) * 7 + (missing,)) if missing else part
            filled = filled.to(self._dtype).contiguous(memory_format=torch.channels_last)
            parts.append(self._network(filled)[: len(part)].float())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def optimize(
    model: nn.Module,
    example: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    merge: Literal["measure", "off"] | Mapping[str, int] | int = "measure",
    compile: bool = True,
) -> OptimizedModel:
    """Build a faster network that computes the same, and measure both.

    Args:
        model: Any timm network; it is not changed.
        example: Pictures `(N, C, H, W)` float32 as they will come, on the network's device: N is the batch computed at
            once, and the error is measured on them.
        dtype: bfloat16 or float32; None takes bfloat16 where the device computes it fast.
        merge: `measure` merges the groups of each layer to the width that is fastest here; `off` merges none; a number
            is a width for all layers; a mapping gives the factor for layers by name.
        compile: Compile the network with its weights frozen. Where that fails, as without a C++ compiler, it stays
            eager and says so.

    Returns:
        The fast network, with its `report`.

    Raises:
        ValueError: If the example is no batch of pictures, or a merge cannot be done.
    """
    if example.ndim != 4 or example.dtype != torch.float32:
        raise ValueError(f"example of shape {tuple(example.shape)} and {example.dtype}: expected (N, C, H, W), float32")
    if dtype is None:
        dtype = torch.bfloat16 if resolve_precision("auto", example.device.type) == "bf16" else torch.float32
    reference = copy.deepcopy(model).eval()
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    folded = fold_batch_norms(fast)
    fast = fast.to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        layers = _merge(fast, example.to(dtype).contiguous(memory_format=torch.channels_last), merge)
        network, compiled = _compile(fast, example, dtype) if compile else (fast, False)
        optimized = OptimizedModel(network, len(example), dtype)
        times = median_times({"reference": lambda: reference(example), "fast": lambda: optimized(example)}, rounds=3)
        expected, found = reference(example), optimized(example)
    optimized.report = OptimizationReport(
        layers=layers,
        folded_batch_norms=folded,
        dtype=str(dtype).removeprefix("torch."),
        compiled=compiled,
        speedup=times["reference"] / times["fast"],
        milliseconds=1000 * times["fast"],
        max_error=float((found - expected).abs().max()),
        relative_error=float((found - expected).norm() / expected.norm()),
        same_predictions=float((found.argmax(1) == expected.argmax(1)).float().mean()),
    )
    return optimized


class _Tracer(fx.Tracer):
    """Keeps layers whole, also those subclasses of batch norm that carry an activation."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Say whether a module is one node of the graph."""
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(module, name)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold each batch norm that follows a convolution alone into it, in place; give their number.

    A batch norm with an activation of its own, as timm has them, leaves that activation. A network that cannot be
    traced is left as it is.
    """
    try:
        graph = _Tracer().trace(model)
    except (TypeError, RuntimeError, ValueError, fx.proxy.TraceError) as error:
        _logger.info("batch norms stay: the network cannot be traced (%s)", error)
        return 0
    modules = dict(model.named_modules())
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        norm, conv = modules[str(node.target)], modules[str(before.target)]
        if type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        _replace(model, str(before.target), fuse_conv_bn_eval(conv, norm))
        _replace(model, str(node.target), getattr(norm, "act", nn.Identity()))
        folded += 1
    return folded


def median_times(work: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Time pieces of work by turns, after a run that does not count; give the median seconds of each."""
    on_cuda = torch.cuda.is_available()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, run in work.items():
            if on_cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            if on_cuda:
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _merge(model: nn.Module, example: torch.Tensor, merge: str | int | Mapping[str, int]) -> tuple[LayerReport, ...]:
    """Merge groups in place; layers of the same kind and shape are measured once."""
    if merge == "off":
        return ()
    convolutions = grouped_convolutions(model)
    shapes = _input_shapes(model, convolutions, example)
    measured: dict[tuple[Any, ...], dict[int, float]] = {}
    reports = []
    for name, conv in convolutions.items():
        width = conv.in_channels // conv.groups
        times: dict[int, float] = {}
        if merge == "measure":
            kind = (conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size, conv.stride, shapes[name])
            if kind not in measured:
                measured[kind] = _layer_times(conv, shapes[name], example)
            times = measured[kind]
            best = min(times, key=times.__getitem__)
            factor = best if times[best] < MARGIN * times[1] else 1
        elif isinstance(merge, Mapping):
            factor = merge.get(name, 1)
        else:
            factor = max([k for k in merge_factors(conv, int(merge)) if k * width <= int(merge)], default=1)
        if factor > 1:
            _replace(model, name, dense_form(conv, factor))
        reports.append(
            LayerReport(
                name=name,
                input_shape=shapes[name],
                width=width,
                merged_width=factor * width,
                milliseconds={k * width: round(1000 * seconds, 4) for k, seconds in times.items()},
            )
        )
    return tuple(reports)


def _layer_times(conv: nn.Conv2d, shape: tuple[int, ...], example: torch.Tensor) -> dict[int, float]:
    x = torch.randn(shape, device=example.device, dtype=example.dtype).contiguous(memory_format=torch.channels_last)
    candidates = {k: dense_form(conv, k) if k > 1 else conv for k in merge_factors(conv)}
    work: dict[str, Callable[[], object]] = {}
    for factor, candidate in candidates.items():
        work[str(factor)] = lambda candidate=candidate: candidate(x)  # type: ignore[misc]
    return {int(factor): seconds for factor, seconds in median_times(work).items()}


def _input_shapes(
    model: nn.Module, modules: Mapping[str, nn.Module], example: torch.Tensor
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():

            def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                shapes[name] = tuple(inputs[0].shape)

            stack.callback(module.register_forward_pre_hook(note).remove)
        model(example)
    return shapes


def _compile(
    model: nn.Module, example: torch.Tensor, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """Compile with frozen weights, which only the global setting does; it is put back, and holds for the first call."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    compiled = torch.compile(model, dynamic=False)
    with config.patch(freezing=True), _quiet_freezing():
        try:
            compiled(example.to(dtype).contiguous(memory_format=torch.channels_last))
        except (BackendCompilerFailed, RuntimeError) as error:
            _logger.warning("the network stays eager, as it could not be compiled: %s", str(error).splitlines()[0])
            return model, False
    return compiled, True


@contextlib.contextmanager
def _quiet_freezing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler speaks of its own internals, which no caller can change
        yield


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
