"""State dicts in, from files and from other libraries, with every tensor that does not fit named."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import nn

_WRAPPERS = ("timm_model.", "model.", "network.", "backbone.")
"""Names under which other libraries keep a whole network: transformers' wrapper, training frameworks, this package."""


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, torch.Tensor], *, skip_classifier: bool = False
) -> None:
    """Load weights into a network, or say what does not fit and leave the network as it was.

    timm's, torchvision's and this package's names are the same. The containers and prefixes that training scripts put
    around a state dict are taken off, and averaged weights are preferred where a file holds both, as timm does.

    Args:
        model: The network.
        source: A `.safetensors` file; a file of `torch.save`, of which only tensors are unpickled; or a state dict.
        skip_classifier: Keep the network's own classifier.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds more than tensors, or keys or shapes differ; they are named.
    """
    if isinstance(source, Mapping):
        state_dict = clean_state_dict(dict(source))
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(f"there is no file of weights {source}")
        try:
            state_dict = load_state_dict(str(source), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:  # timm's versions differ in what they raise
            raise ValueError(
                f"{source} holds more than tensors, or is no file of weights, and is not unpickled: {error}"
            ) from error
    state_dict = _without_wrapper(state_dict)

    expected = model.state_dict()
    if skip_classifier:
        kept = {name for name in expected if name.partition(".")[0] == "fc"}
        state_dict = {key: value for key, value in state_dict.items() if key.partition(".")[0] != "fc"}
        state_dict |= {name: expected[name] for name in kept}
    _require_fit(state_dict, expected)
    model.load_state_dict(state_dict, strict=False)  # what may be missing was looked at above


def _without_wrapper(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _WRAPPERS:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            return {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return dict(state_dict)


def _require_fit(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    problems = []
    for key, tensor in found.items():
        if key not in expected:
            problems.append(f"{key} {_shape(tensor)}: not in the network")
        elif tensor.shape != expected[key].shape:
            problems.append(f"{key}: {_shape(tensor)} in the weights, {_shape(expected[key])} in the network")
    # the oldest files of torchvision come without the counters of the norm layers, which evaluation does not read
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    problems += [f"{key} {_shape(expected[key])}: not in the weights" for key in missing]
    if problems:
        more = f"\n… and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("the weights do not fit the network:\n" + "\n".join(problems[:8]) + more)


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))
