"""Optimize a trained model for inference on this machine, by measurement.

The function is preserved: batch norms are folded into the preceding convolutions, neighboring groups are merged to the
fastest width for each layer's shape, weights and activations get the requested type and memory format, the model is
compiled with frozen weights, and the fastest batch size is chosen. The numerical error is measured in the same call,
against the original model in float32.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from resnext_hub import machine
from resnext_hub.errors import RequestError, one_line
from resnext_hub.inference.checks import check_request
from resnext_hub.inference.engines import Objective, Request, build_fastest, in_parts
from resnext_hub.kernels.fold import fold_batch_norms
from resnext_hub.kernels.timing import Latency, latencies, median_seconds
from resnext_hub.kernels.widths import LayerChoice, Merge
from resnext_hub.models.weights import require_finite

_logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Relative error above which a float32 model computes another function; rounding alone stays below."""

TOLERANCES = {"float32": TOLERANCE, "float16": 0.05, "bfloat16": 0.1, "int8": 0.5}
"""The same by compute type."""


@dataclass(frozen=True, kw_only=True)
class OptimizationReport:
    """What `optimize` did, with the resulting speedup and error."""

    layers: tuple[LayerChoice, ...]
    folded_batch_norms: int
    engine: str
    """torch.compile, torch eager or OpenVINO."""
    dtype: str
    """bfloat16, float32 or int8."""
    compiled: bool
    at_once: int
    """Batch size of the forward passes."""
    milliseconds_at_once: dict[int, float]
    """Median time of the optimized model on the example, by batch size; empty if only one batch size was tried."""
    threads: int
    """Number of threads of a forward pass on a CPU."""
    milliseconds_by_threads: dict[int, float]
    """Median time per image, by number of threads; empty if only one number was tried."""
    latency: tuple[Latency, Latency] | None
    """Time per image with the original model (eager, float32) and with the optimized model; None if the objective was
    throughput."""
    speedup: float
    """Time of the original model (eager, float32) divided by that of the optimized model: on the whole example or, if
    the objective was latency, on its first image."""
    milliseconds: float
    """Median time of the optimized model, on the same images."""
    weight_bytes: tuple[int, int]
    """Size of the weights of the original model and of the optimized model, in bytes. Merging groups makes the weights
    larger; a narrower type makes them smaller."""
    max_error: float
    """Largest absolute difference of a logit from the float32 reference, on the example."""
    relative_error: float
    """Norm of the difference divided by the norm of the reference's logits, on the example."""
    second_error: float
    """The relative error on a second batch of a different size with different values; it is large if the output for an
    image depends on the other images in its batch, or if the model branches on its data."""
    same_predictions: float
    """Fraction of the example's images with the same predicted class, 0 to 1."""

    def __str__(self) -> str:
        """Return a summary, with a line for each kind of layer."""
        bytes_before, bytes_after = self.weight_bytes
        lines = [
            f"{self.engine}, {self.dtype}, batch size {self.at_once}: {self.milliseconds:.1f} ms, speedup "
            f"{self.speedup:.2f}x over the original model (eager, float32)",
            f"relative error of the logits {self.relative_error:.1e}, largest difference {self.max_error:.1e}, "
            f"relative error on a second batch {self.second_error:.1e}; same class for "
            f"{self.same_predictions:.1%} of the images",
            f"{self.folded_batch_norms} batch norms folded; weights {bytes_after / 1e6:.1f} MB (were "
            f"{bytes_before / 1e6:.1f} MB)",
        ]
        if self.latency is not None:
            before, after = self.latency
            lines.append(f"one image: {after} with {self.threads} threads, {before} before")
        kinds: dict[str, list[str]] = {}
        for layer in self.layers:
            times = ", ".join(f"{width}: {time:.2f} ms" for width, time in layer.milliseconds.items())
            text = f"{layer.width} -> {layer.merged_width} channels at {layer.input_shape} ({times or layer.source})"
            kinds.setdefault(text, []).append(layer.name)
        lines += [f"groups of {text}: {', '.join(names)}" for text, names in kinds.items()]
        return "\n".join(lines)


class OptimizedModel(nn.Module):
    """An optimized model, which maps float32 images `(N, C, H, W)`, for any N, to float32 logits `(N, classes)`.

    Forward passes have a fixed shape: smaller batches are padded, larger ones are split.
    """

    is_optimized = True
    """Tells `optimize` not to optimize the model again."""

    def __init__(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        at_once: int,
        image_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        super().__init__()
        self._compute = compute
        self._at_once = at_once
        self._image_shape = image_shape
        self._device = device
        self.report: OptimizationReport | None = None
        """The report; set by `optimize`."""

    @property
    def device(self) -> torch.device:
        """The device of the example; images have to be on this device."""
        return self._device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `(N, C, H, W)` to logits `(N, classes)`.

        Raises:
            RequestError: If the images are not a tensor, or their shape, type or device differs from the example's.
        """
        if not isinstance(images, torch.Tensor):
            raise RequestError(
                f"images is a {type(images).__name__}: expected a tensor (N, C, H, W), such as one from torch.stack"
            )
        if images.device != self._device:
            raise RequestError(f"images on {images.device}: expected {self._device}, the device of the example")
        if images.shape[1:] != self._image_shape or images.dtype != torch.float32:
            expected = ", ".join(map(str, self._image_shape))
            raise RequestError(
                f"images of shape {tuple(images.shape)} and dtype {images.dtype}: expected (N, {expected}), float32, "
                "as in the example"
            )
        # inference mode would compile the model again, and without frozen weights
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            images = images.clone() if images.is_inference() else images.detach()
            return in_parts(self._compute, self._at_once, images)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise TypeError, because the compiled code belongs to this process.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "an optimized model cannot be pickled or copied, because it is compiled for this process; save the "
            "original model and call optimize again"
        )


def optimize(
    model: nn.Module,
    example: torch.Tensor,
    *,
    engine: Literal["torch", "openvino"] = "torch",
    dtype: torch.dtype | None = None,
    merge: Merge = "measure",
    at_once: int | Literal["measure"] = "measure",
    compile: bool = True,
    objective: Objective = "throughput",
    calibration: torch.Tensor | None = None,
    keep_memory: bool = True,
) -> OptimizedModel:
    """Build a faster model that computes the same function, and measure its speedup and error.

    Args:
        model: Any timm model; it is not changed.
        example: Representative images `(N, C, H, W)` float32 on the model's device, on which time and error are
            measured.
        engine: `torch`, or, on a CPU, `openvino`, which requires the `openvino` extra.
        dtype: bfloat16 or float32; None chooses bfloat16 if it is fast on the device.
        merge: `measure` merges the groups of each layer to the width that is fastest on this machine, measured now or
            earlier; `table` uses the widths that were fastest on another machine; `off` merges no groups; a number is
            the maximum width for all layers; a mapping contains the merge factors by layer name.
        at_once: Batch size of the forward passes, at most N. `measure` tries N and, on a CPU, N/2, N/4 and N/8, because
            the activations of smaller batches fit into the CPU's caches.
        compile: With torch, compile with frozen weights; without a C++ compiler, stay eager, with a warning.
        objective: `throughput` optimizes for batches. `latency` optimizes for single images: widths and the number of
            threads (1 or all) are measured at a batch size of 1, and the report has percentiles of the time per image.
        calibration: With OpenVINO: normalized images `(M, C, H, W)` float32, with M at least N. If given, convolutions
            are computed in int8, and the ranges of their activations are determined on these images. This increases the
            error, so check the accuracy.
        keep_memory: With glibc, keep freed memory in this process from now on, because requesting zeroed memory from
            the operating system again for each batch can take a fifth of the time.

    Returns:
        The optimized model, with its `report`.

    Raises:
        ValueError: If an argument is invalid, or the model cannot be optimized: it is compiled, quantized or cannot be
            copied, it does not accept the example or returns no logits, or a value is not finite.
        ModuleNotFoundError: If the engine is not installed.
    """
    check_request(model, example, engine, dtype, merge, at_once, calibration, objective)
    dtype = dtype or _fast_dtype(example.device)
    if keep_memory:
        machine.keep_memory(example.device.type)
    require_finite(model)
    reference = _copied(model).eval().float()
    fast = copy.deepcopy(reference).requires_grad_(False)
    with torch.no_grad(), torch.autocast(example.device.type, enabled=False):
        expected = _logits_of(reference, example)
        folded = fold_batch_norms(fast)
        built = build_fastest(fast, example, Request(engine, dtype, merge, at_once, compile, calibration, objective))
        optimized = OptimizedModel(built.compute, built.at_once, tuple(example.shape[1:]), example.device)
        milliseconds, one_image = _times(reference, optimized, example, objective)
        found = optimized(example)
        second_error = _second_error(reference, optimized, example)
    computed_in = "int8" if calibration is not None else str(dtype).removeprefix("torch.")
    optimized.report = OptimizationReport(
        layers=built.layers,
        folded_batch_norms=folded,
        engine=built.engine,
        dtype=computed_in,
        compiled=built.engine != "torch eager",
        at_once=built.at_once,
        milliseconds_at_once=built.milliseconds_at_once,
        threads=built.threads,
        milliseconds_by_threads=built.milliseconds_by_threads,
        latency=one_image,
        speedup=milliseconds[0] / milliseconds[1],
        milliseconds=milliseconds[1],
        weight_bytes=(_weight_bytes(model), _weight_bytes(built.model, 1 if computed_in == "int8" else dtype.itemsize)),
        max_error=float((found - expected).abs().max()),
        relative_error=_relative(found, expected),
        second_error=second_error,
        same_predictions=float((found.argmax(1) == expected.argmax(1)).float().mean()),
    )
    _warn_if_different(optimized.report)
    return optimized


def _fast_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if machine.resolve_precision("auto", device.type) == "bf16" else torch.float32


def _times(
    reference: nn.Module, optimized: OptimizedModel, example: torch.Tensor, objective: Objective
) -> tuple[tuple[float, float], tuple[Latency, Latency] | None]:
    """Return the median milliseconds of both models on the example, or on its first image if latency is optimized."""
    images = example if objective == "throughput" else example[:1]
    runs = {"reference": lambda: reference(images), "fast": lambda: optimized(images)}
    if objective == "latency":
        found = latencies(runs, example.device)
        before, after = found["reference"], found["fast"]
        return (before.p50, after.p50), (before, after)
    seconds = median_seconds(runs, example.device, rounds=3, warm=True)
    return (1000 * seconds["reference"], 1000 * seconds["fast"]), None


def _warn_if_different(report: OptimizationReport) -> None:
    if not max(report.relative_error, report.second_error) <= TOLERANCES[report.dtype]:  # also true for NaN
        _logger.warning(
            "the relative error of the optimized model's logits is %.1e on the example and %.1e on a second batch, "
            "more than rounding in %s explains (%.0e): the optimized model computes a different function, for example "
            "because the output for an image depends on the other images in its batch, or on a branch",
            report.relative_error,
            report.second_error,
            report.dtype,
            TOLERANCES[report.dtype],
        )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        if machine.is_out_of_memory(error):
            raise
        raise RequestError(
            f"the model cannot be copied with copy.deepcopy ({one_line(error)[:100]}); use, for example, "
            "torch.nn.utils.parametrizations.weight_norm instead of torch.nn.utils.weight_norm"
        ) from error


def _logits_of(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    """Return the logits of the original model, or raise RequestError if it has none for such images."""
    try:
        logits = model(example)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        if machine.is_out_of_memory(error):
            raise
        raise RequestError(
            f"the model does not accept an example of shape {tuple(example.shape)} ({one_line(error)}): expected "
            "images with the channels, size and device that the model needs"
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise RequestError(f"the model returns a {type(logits).__name__}: expected one tensor, such as logits")
    if logits.ndim < 2 or len(logits) != len(example):
        raise RequestError(
            f"the model returns {tuple(logits.shape)} for {len(example)} images: expected logits (N, classes)"
        )
    if not logits.isfinite().all():
        raise RequestError("the model's logits for the example are not finite: expected a trained model in float32")
    return logits


def _second_error(reference: nn.Module, optimized: nn.Module, example: torch.Tensor) -> float:
    """Return the relative error on the example's images mirrored and negated, and one more of noise."""
    noise = torch.randn(1, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example.device)
    second = torch.cat([-example.flip(0, 3), noise])
    return _relative(optimized(second), reference(second).float())


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _weight_bytes(model: nn.Module, itemsize: int | None = None) -> int:
    return sum(tensor.numel() * (itemsize or tensor.element_size()) for tensor in model.state_dict().values())
