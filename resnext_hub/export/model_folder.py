"""A trained network as a folder that stock timm and transformers load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from resnext_hub.errors import RequestError, RunError
from resnext_hub.files import new_folder, sha256_of, write_json
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.saved import CONFIG, WEIGHTS, SavedModel, read_model


def export_model(network: nn.Module, folder: Path, **facts: Any) -> str:
    """Replace a folder, whole, by one with the model; see `write_model` for the facts and what is raised.

    Returns:
        SHA-256 of the weights file.
    """
    with new_folder(folder) as aside:
        return write_model(network, aside, **facts)


def write_model(
    network: nn.Module,
    folder: Path,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    input: InputConfig,
    label_names: Sequence[str],
    license: str | None,
    plugin_facts: Mapping[str, Any],
) -> str:
    """Write `model.safetensors` and `config.json`, load them again, and compare weights and logits.

    Args:
        network: The trained network, on any device.
        folder: An empty folder.
        architecture: timm architecture that builds the network.
        model_args: Arguments that differ from the architecture's own. More than those would make transformers fail.
        input: The images that the model takes.
        label_names: Class names in the order of the logits.
        license: Licence of the weights, if it is known.
        plugin_facts: This package's own facts, for the top-level key `resnext_hub`: timm refuses keys it does not know
            inside pretrained_cfg, and ignores them here.

    Returns:
        SHA-256 of the weights file.

    Raises:
        RunError: If the folder does not load back to the same model.
    """
    config = build_config(
        network,
        architecture=architecture,
        model_args=model_args,
        input=input,
        label_names=label_names,
        license=license,
        plugin_facts=plugin_facts,
    )
    # a channels_last tensor is not contiguous, and safetensors would refuse it
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
    try:
        saved = read_model(str(folder), folder / CONFIG, folder / WEIGHTS)
        _verify(network, saved, input.input_size)
    except RequestError as error:  # such as weights that are not finite
        raise RunError(f"the trained model cannot be saved: {error}") from error
    return sha256_of(folder / WEIGHTS)


def build_config(
    network: nn.Module,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    input: InputConfig,
    label_names: Sequence[str],
    license: str | None,
    plugin_facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of config.json; the arguments are those of `export_model`."""
    known: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    pretrained_cfg = {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in input.to_timm().items()},
        "num_classes": len(label_names),
        "pool_size": None,
        "fixed_input_size": known.get("fixed_input_size") or None,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "custom_load": False,
        "license": license,
    }
    return {
        "architecture": architecture,
        "num_classes": len(label_names),
        "num_features": network.num_features,
        "label_names": list(label_names),
        **({"model_args": dict(model_args)} if model_args else {}),
        "pretrained_cfg": {key: value for key, value in pretrained_cfg.items() if value is not None},
        "resnext_hub": dict(plugin_facts),
    }


@torch.inference_mode()
def _verify(network: nn.Module, saved: SavedModel, input_size: Sequence[int]) -> None:
    """Compare a model with what was saved of it: weights to the bit, logits to rounding.

    The last bits of logits depend on how tensors are aligned in memory, which is not the same on both sides.
    """
    reloaded = saved.load()
    weights = reloaded.state_dict()
    if not all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in network.state_dict().items()):
        raise RunError("the exported weights are not those of the trained model; nothing was published")
    images = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    reference = network.eval()
    device = next(reference.parameters()).device
    # the same memory format on both sides: another one may be another algorithm
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    found = reloaded.to(device).to(memory_format=torch.channels_last)(images)
    expected = reference.to(memory_format=torch.channels_last)(images)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise RunError("the exported model does not give the logits of the trained one; nothing was published")
