"""Model folders that unmodified timm and transformers load."""

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
from resnext_hub.models.saved_config import MULTI_LABEL


def export_model(model: nn.Module, folder: Path, **facts: Any) -> str:
    """Write a model folder atomically, replacing an existing one; see `write_model` for the facts and errors.

    Returns:
        SHA-256 of the weights file.
    """
    with new_folder(folder) as aside:
        return write_model(model, aside, **facts)


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    input: InputConfig,
    label_names: Sequence[str],
    license: str | None,
    plugin_facts: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
) -> str:
    """Write `model.safetensors` and `config.json`, load them back, and compare weights and logits.

    Args:
        model: The trained model, on any device.
        folder: An empty folder.
        architecture: timm architecture of the model.
        model_args: Arguments that differ from the architecture's defaults, and only those: transformers fails on more.
        input: The input that the model expects.
        label_names: Class names, in the order of the logits.
        license: License of the weights, if known.
        plugin_facts: Facts of this package for the top-level key `resnext_hub`; timm ignores unknown keys there but
            rejects them inside pretrained_cfg.
        thresholds: Lowest probability at which each label is predicted, if an image can have several.

    Returns:
        SHA-256 of the weights file.

    Raises:
        RunError: If the folder does not load back to the same model.
    """
    config = build_config(
        model,
        architecture=architecture,
        model_args=model_args,
        input=input,
        label_names=label_names,
        license=license,
        plugin_facts=plugin_facts,
        thresholds=thresholds,
    )
    # safetensors rejects channels_last tensors, which are not contiguous
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
    try:
        saved = read_model(str(folder), folder / CONFIG, folder / WEIGHTS)
        _verify(model, saved, input.input_size)
    except RequestError as error:  # such as non-finite weights
        raise RunError(f"the trained model cannot be saved: {error}") from error
    return sha256_of(folder / WEIGHTS)


def build_config(
    model: nn.Module,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    input: InputConfig,
    label_names: Sequence[str],
    license: str | None,
    plugin_facts: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the content of config.json; see `write_model` for the arguments."""
    known: dict[str, Any] = getattr(model, "pretrained_cfg", {})
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
        "num_features": model.num_features,
        "label_names": list(label_names),
        **({"model_args": dict(model_args)} if model_args else {}),
        **({} if thresholds is None else {"problem_type": MULTI_LABEL}),
        "pretrained_cfg": {key: value for key, value in pretrained_cfg.items() if value is not None},
        "resnext_hub": dict(plugin_facts) | ({} if thresholds is None else {"thresholds": list(thresholds)}),
    }


@torch.inference_mode()
def _verify(model: nn.Module, saved: SavedModel, input_size: Sequence[int]) -> None:
    """Raise RunError unless a saved model has the same weights, bit for bit, and the same logits up to rounding.

    The last bits of logits depend on the alignment of tensors in memory, which differs between the two models.
    """
    reloaded = saved.load()
    weights = reloaded.state_dict()
    if not all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in model.state_dict().items()):
        raise RunError("the exported weights differ from those of the trained model; nothing was published")
    images = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    reference = model.eval()
    device = next(reference.parameters()).device
    # the same memory format for both, since it can select a different algorithm
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    logits = reloaded.to(device).to(memory_format=torch.channels_last)(images)
    expected = reference.to(memory_format=torch.channels_last)(images)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise RunError("the logits of the exported model differ from those of the trained model; nothing was published")
