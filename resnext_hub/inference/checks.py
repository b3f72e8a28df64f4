"""Check the arguments of `optimize`."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from resnext_hub.errors import RequestError, setting
from resnext_hub.kernels.widths import Merge
from resnext_hub.settings import shown


def check_request(
    model: nn.Module,
    example: torch.Tensor,
    engine: str,
    dtype: torch.dtype | None,
    merge: Merge,
    at_once: int | Literal["measure"],
    calibration: torch.Tensor | None,
    objective: str,
) -> None:
    """Check the arguments of `optimize` before any work.

    Raises:
        ValueError: If one is invalid.
    """
    _check_model(model)
    for name, images in (("example", example), ("calibration", calibration)):
        if name == "example" or images is not None:
            _check_images(name, images)
    if engine not in ("torch", "openvino"):
        raise ValueError(f"engine={engine!r}: expected 'torch' or 'openvino'")
    if dtype not in (None, torch.bfloat16, torch.float32) and (dtype != torch.float16 or example.device.type == "cpu"):
        raise ValueError(f"dtype={dtype!r}: expected torch.bfloat16, torch.float32, None or, on a GPU, torch.float16")
    if not _is_merge(merge):
        raise RequestError(
            f"merge={shown(repr(merge))}: expected 'measure', 'table', 'off', a width in channels (an int of at "
            "least 1), or a mapping from layers to factors"
        )
    if engine == "openvino" and example.device.type != "cpu":
        raise ValueError(f"engine='openvino' runs on a CPU, but the example is on {example.device}")
    if calibration is not None and engine != "openvino":
        raise ValueError(f"calibration requires engine='openvino', but engine is {engine!r}")
    if calibration is not None and (calibration.shape[1:] != example.shape[1:] or len(calibration) < len(example)):
        raise ValueError(
            f"calibration of shape {tuple(calibration.shape)}: expected at least {len(example)} images of the "
            f"example's shape, {tuple(example.shape[1:])}"
        )
    if objective not in ("throughput", "latency"):
        raise RequestError(f"{setting('objective', shown(repr(objective)))}: expected 'throughput' or 'latency'")
    if objective == "latency" and at_once not in ("measure", 1):
        raise RequestError(
            f"at_once={shown(repr(at_once))} needs objective='throughput'; with 'latency', it is always 1"
        )
    if at_once != "measure" and not (_is_count(at_once) and at_once <= len(example)):
        raise RequestError(
            f"at_once={shown(repr(at_once))}: expected an int from 1 to {len(example)} (the number of example "
            "images), or 'measure'"
        )


def _check_model(model: object) -> None:
    """Raise RequestError unless this is an eager model with floating-point weights, not compiled or quantized."""
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"model is a {type(model).__name__}: expected an nn.Module, such as one from timm.create_model"
        )
    if isinstance(model, torch.jit.ScriptModule) or getattr(model, "is_optimized", False):
        raise RequestError(f"model is a {type(model).__name__}, which is already compiled: expected the original model")
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_quantized:
            raise RequestError(
                f"the model's {name} is not a plain tensor, so the model may be quantized; expected the original model"
            )
        if is_lazy(tensor) or tensor.is_meta:
            why = "is uninitialized" if is_lazy(tensor) else "is on the meta device"
            raise RequestError(f"the model's weights are not materialized ({name} {why}): expected a trained model")


def _check_images(name: str, images: object) -> None:
    if not isinstance(images, torch.Tensor):
        raise RequestError(
            f"{name} is a {type(images).__name__}: expected a float32 tensor (N, C, H, W), such as one from torch.stack"
        )
    if images.is_meta or images.layout != torch.strided:
        raise RequestError(
            f"{name} is a tensor on device {images.device} with layout {images.layout}: expected a dense, "
            "materialized float32 tensor of normalized images, of shape (N, C, H, W)"
        )
    if images.ndim != 4 or images.dtype != torch.float32 or images.numel() == 0:
        raise RequestError(
            f"{name} of shape {tuple(images.shape)} and dtype {images.dtype}: expected (N, C, H, W), float32"
        )
    if not images.isfinite().all():
        raise RequestError(f"{name} contains NaN or infinity: expected normalized images")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_merge(merge: object) -> bool:
    if isinstance(merge, Mapping):
        return all(map(_is_count, merge.values()))
    return merge in ("measure", "table", "off") if isinstance(merge, str) else _is_count(merge)
