"""Load state dicts from files and other libraries, with errors that name each tensor that does not match."""

import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict, load_state_dict
from torch import nn

from resnext_hub.errors import RequestError

_WRAPPERS = ("timm_model.", "module.", "model.", "network.", "backbone.")
"""Prefixes under which other libraries store a whole model: transformers' timm wrapper and training frameworks."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LARGEST = 2.0**63
"""Largest valid weight: the square of a larger one overflows float32."""


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, torch.Tensor], *, skip_classifier: bool = False
) -> None:
    """Load weights into a model, which stays unchanged if the weights do not match.

    timm, torchvision and this package use the same names. As in timm, containers and prefixes that training scripts
    add to a state dict are removed, and averaged weights are preferred if a file also contains them.

    Args:
        model: The model.
        source: A `.safetensors` file; a file written by `torch.save`, from which only tensors are unpickled; or a state
            dict.
        skip_classifier: Keep the classifier of the model instead of loading one.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file contains anything but tensors, or keys or shapes differ; the message lists the
            differences.
    """
    if isinstance(source, Mapping):
        state_dict = clean_state_dict(dict(source))
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(f"there is no weights file {source}")
        try:
            state_dict = load_state_dict(str(source), weights_only=True)
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:  # timm's versions differ
            raise ValueError(
                f"{source} is not a weights file, or contains objects other than tensors, which are never unpickled: "
                f"{error}"
            ) from error
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()):
        raise ValueError(
            f"{source if isinstance(source, (str, Path)) else 'the state dict'} contains objects other than tensors"
        )
    state_dict = {name: state_dict[key] for name, key in strip_wrapper(state_dict).items()}

    expected = model.state_dict()
    if skip_classifier:
        kept = {name for name in expected if name.partition(".")[0] == "fc"}
        state_dict = {key: value for key, value in state_dict.items() if key.partition(".")[0] != "fc"}
        state_dict |= {name: expected[name] for name in kept}
    _require_fit(state_dict, expected)
    model.load_state_dict(state_dict, strict=False)  # missing keys were checked above


def strip_wrapper(names: Iterable[str]) -> dict[str, str]:
    """Return the names of tensors by their names without a wrapper's prefix, if all of them share one."""
    names = list(names)
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return {name.removeprefix(prefix): name for name in names}
    return {name: name for name in names}


def problem_of(name: str, tensor: torch.Tensor) -> str | None:
    """Return a description of invalid values in a tensor of float32 weights, or None."""
    if not tensor.numel():
        return None
    low, high = (float(value) for value in torch.aminmax(tensor))
    if math.isnan(low) or math.isnan(high):
        return "contains NaN: expected finite numbers"
    if max(-low, high) > LARGEST:
        return f"contains {high if high > -low else low:.3g}: expected numbers whose square is finite in float32"
    if low < 0 and name.endswith(("running_var", "num_batches_tracked")):
        return f"contains {low:.3g}: expected no negative numbers"
    return None


def require_finite(model: nn.Module) -> None:
    """Raise RequestError if a weight of a model is not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RequestError(f"the weights of the model are not finite: {name} contains NaN or infinity")


def _require_fit(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    problems = []
    for key, tensor in found.items():
        if key not in expected:
            problems.append(f"{key} {_shape(tensor)}: not in the model")
        elif tensor.shape != expected[key].shape:
            problems.append(f"{key}: {_shape(tensor)} in the weights, {_shape(expected[key])} in the model")
        elif tensor.dtype not in ((torch.int64,) if key.endswith("num_batches_tracked") else _FLOATS):
            problems.append(f"{key}: of type {str(tensor.dtype).removeprefix('torch.')} in the weights")
        elif problem := problem_of(key, tensor.detach()):
            problems.append(f"{key} {problem}")
    # the oldest files of torchvision lack the counters of batch norm, which evaluation does not use
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    problems += [f"{key} {_shape(expected[key])}: not in the weights" for key in missing]
    if problems:
        more = f"\n… and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("the weights do not match the model:\n" + "\n".join(problems[:8]) + more)


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))
