"""From a trained network to the fastest one that computes the same, measured on the machine at hand.

What is done keeps the function: batch norm is folded into the convolution before it, neighbouring groups are merged
to the width that is fastest here for each layer's shape, weights and activations take the asked precision and memory
format, and the whole is compiled with its weights frozen. What it costs in accuracy is measured in the same call,
against the network as it was given, in float32.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnext_hub.machine import resolve_precision
from resnext_hub.models.merged import dense_form, grouped_convolutions, replace_module
from resnext_hub.models.widths import LayerChoice, Merge, Timing, choose_widths, factors_of, median_seconds

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OptimizationReport:
    """What was done, what it gains and what it costs."""

    layers: tuple[LayerChoice, ...]
    folded_batch_norms: int
    engine: str
    """What computes: torch.compile, torch eager or OpenVINO."""
    dtype: str
    """bfloat16, float32 or int8."""
    compiled: bool
    speedup: float
    """Time of the given network on the example, eager in float32, over that of the fast one."""
    milliseconds: float
    """Median time of the fast network on the example."""
    weight_bytes: tuple[int, int]
    """Bytes of the given network's weights, and of those that the fast one computes with; block-diagonal ones are
    larger, and a shorter type makes them smaller."""
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

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor], batch_size: int) -> None:
        super().__init__()
        self._network = network
        self._batch_size = batch_size
        self.report: OptimizationReport | None = None
        """What was done; set by `optimize`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map pictures `(N, C, H, W)` to logits `(N, classes)`."""
        # a compiled network is compiled anew for inference mode, and then not with its weights frozen
        with torch.inference_mode(False), torch.no_grad():
            return self._logits(images.clone() if images.is_inference() else images)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in torch.split(images, self._batch_size):
            missing = self._batch_size - len(part)
            filled = nn.functional.pad(part, (0,) * 7 + (missing,)) if missing else part
            parts.append(self._network(filled)[: len(part)].float())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def optimize(
    model: nn.Module,
    example: torch.Tensor,
    *,
    engine: Literal["torch", "openvino"] = "torch",
    dtype: torch.dtype | None = None,
    merge: Merge = "measure",
    compile: bool = True,
    calibration: torch.Tensor | None = None,
) -> OptimizedModel:
    """Build a faster network that computes the same, and measure both.

    Args:
        model: Any timm network; it is not changed.
        example: Pictures `(N, C, H, W)` float32 as they will come, on the network's device: N is the batch computed at
            once, and the error is measured on them.
        engine: `torch`, or `openvino` on a CPU, which the extra of that name installs.
        dtype: bfloat16 or float32; None takes bfloat16 where the device computes it fast.
        merge: `measure` merges the groups of each layer to the width that is fastest here, as measured now or
            remembered; `table` to what was fastest on another machine; `off` merges none; a number is a width for all
            layers; a mapping gives the factor for layers by name.
        compile: With torch, compile the network with its weights frozen. Where that fails, as without a C++ compiler,
            it stays eager and says so.
        calibration: With OpenVINO, normalised pictures `(M, C, H, W)` float32, M at least N: convolutions are computed
            in int8, with the ranges that activations have on these pictures. The error is larger then: check the
            accuracy.

    Returns:
        The fast network, with its `report`.

    Raises:
        ValueError: If the example is no batch of pictures, a merge cannot be done, or the engine cannot do it.
    """
    if example.ndim != 4 or example.dtype != torch.float32:
        raise ValueError(f"example of shape {tuple(example.shape)} and {example.dtype}: expected (N, C, H, W), float32")
    if engine == "openvino" and example.device.type != "cpu":
        raise ValueError(f"engine='openvino' computes on a CPU, and the example is on {example.device}")
    if calibration is not None and engine != "openvino":
        raise ValueError(f"calibration goes with engine='openvino', not with {engine!r}")
    if calibration is not None and (calibration.shape[1:] != example.shape[1:] or len(calibration) < len(example)):
        raise ValueError(
            f"calibration of shape {tuple(calibration.shape)}: expected at least {len(example)} pictures of the "
            f"example's shape, {tuple(example.shape[1:])}"
        )
    if dtype is None:
        dtype = torch.bfloat16 if resolve_precision("auto", example.device.type) == "bf16" else torch.float32
    reference = copy.deepcopy(model).eval()
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    folded = fold_batch_norms(fast)
    with torch.no_grad():
        build = _build_openvino if engine == "openvino" else _build_torch
        network, layers, did = build(fast, example, dtype, merge, compile, calibration)
        optimized = OptimizedModel(network, len(example))
        times = median_seconds(
            {"reference": lambda: reference(example), "fast": lambda: optimized(example)}, example.device, rounds=3
        )
        expected, found = reference(example), optimized(example)
    optimized.report = OptimizationReport(
        layers=layers,
        folded_batch_norms=folded,
        engine=did,
        dtype="int8" if calibration is not None else str(dtype).removeprefix("torch."),
        compiled=did != "torch eager",
        speedup=times["reference"] / times["fast"],
        milliseconds=1000 * times["fast"],
        weight_bytes=(_weight_bytes(reference), _weight_bytes(fast, 1 if calibration is not None else dtype.itemsize)),
        max_error=float((found - expected).abs().max()),
        relative_error=float((found - expected).norm() / expected.norm()),
        same_predictions=float((found.argmax(1) == expected.argmax(1)).float().mean()),
    )
    return optimized


Built = tuple[Callable[[torch.Tensor], torch.Tensor], tuple[LayerChoice, ...], str]


def _build_torch(
    fast: nn.Module,
    example: torch.Tensor,
    dtype: torch.dtype,
    merge: Merge,
    compile: bool,
    calibration: torch.Tensor | None,
) -> Built:
    def cast(images: torch.Tensor) -> torch.Tensor:
        return images.to(dtype, memory_format=torch.channels_last)

    fast.to(dtype).to(memory_format=torch.channels_last)
    layers = merge_layers(fast, cast(example), merge)
    network, compiled = compile_frozen(fast, cast(example)) if compile else (fast, False)
    return lambda images: network(cast(images)), layers, "torch.compile" if compiled else "torch eager"


def _build_openvino(
    fast: nn.Module,
    example: torch.Tensor,
    dtype: torch.dtype,
    merge: Merge,
    compile: bool,
    calibration: torch.Tensor | None,
) -> Built:
    from resnext_hub.inference.openvino import OpenVinoNetwork, OpenVinoTiming, convert

    fast.float()
    layers = merge_layers(fast, example, merge, OpenVinoTiming(fast, example, dtype, calibration))
    return OpenVinoNetwork(convert(fast, example, calibration), dtype), layers, "OpenVINO"


def merge_layers(
    model: nn.Module, example: torch.Tensor, merge: Merge, timing: Timing | None = None
) -> tuple[LayerChoice, ...]:
    """Merge groups in place, with weights that stay as they are; give what was chosen for each grouped convolution."""
    convolutions = grouped_convolutions(model)
    choices = choose_widths(model, example, merge, timing=timing)
    for name, factor in factors_of(choices).items():
        replace_module(model, name, dense_form(convolutions[name], factor))
    return choices


def _weight_bytes(model: nn.Module, itemsize: int | None = None) -> int:
    return sum(tensor.numel() * (itemsize or tensor.element_size()) for tensor in model.state_dict().values())


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
        replace_module(model, str(before.target), fuse_conv_bn_eval(conv, norm))
        replace_module(model, str(node.target), getattr(norm, "act", nn.Identity()))
        folded += 1
    return folded


def compile_frozen(model: nn.Module, example: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """Compile with frozen weights, which only the global setting does; it is put back, and holds for the first call."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    def run(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(images)
        return found

    # the compiler keeps what it made by code object, and only a few for each: networks must not share one
    run.__code__ = run.__code__.replace(co_name=f"run_{id(model)}")
    compiled = torch.compile(run, dynamic=False)
    with config.patch(freezing=True), _quiet_freezing():
        try:
            compiled(example)
        except (BackendCompilerFailed, RuntimeError) as error:
            _logger.warning("the network stays eager, as it could not be compiled: %s", str(error).splitlines()[0])
            return model, False
    return compiled, True


@contextlib.contextmanager
def _quiet_freezing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler speaks of its own internals, which no caller can change
        yield
