"""A trained network by the words that people use for it: a run folder, a model folder, or `hf-hub:owner/repo`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.models.source import WEIGHTS, ModelSource, find_model


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network with its weights, and what it says of its input and its classes."""

    network: nn.Module
    """On the CPU, in float32 and evaluation mode: `(N, C, H, W)` normalised to logits `(N, classes)`."""
    data_config: dict[str, Any]
    """input_size, crop_pct, crop_mode, interpolation, mean and std in timm's words."""
    label_names: tuple[str, ...]
    """One for each logit."""
    source: ModelSource

    @property
    def folder(self) -> Path | None:
        """The model folder, absolute; None for a model of the Hub."""
        kind, _, place = self.source.requested.partition(":")
        return Path(place) if kind == "local-dir" else None


def load_trained(where: str) -> TrainedModel:
    """Load a trained network.

    Args:
        where: A run folder, of which the `model` folder is taken; a folder with config.json and model.safetensors;
            `hf-hub:owner/repo[@revision]`.

    Raises:
        RequestError: If it is none of them, or cannot be loaded as it is.
        RunError: If the Hub cannot be reached.
    """
    try:
        source = find_model(_model_words(where))
    except RequestError as error:
        # there it is the value of a flag, here it is a word of its own
        raise RequestError(str(error).removeprefix("--model ")) from error
    except RunError as error:
        raise RunError(
            f"the Hub could not be reached for {where}, and it is not in the cache; try again later"
        ) from error
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: its config.json is not JSON ({one_line(error)})") from error
    try:
        network = timm.create_model(source.requested, pretrained=True).float().eval()
    except (SafetensorError, RuntimeError, TypeError) as error:  # what damaged or foreign weights and arguments give
        raise RequestError(
            f"{where}: {WEIGHTS} and config.json do not make a {source.architecture}: {one_line(error)}"
        ) from error
    return TrainedModel(
        network=network,
        data_config=timm.data.resolve_model_data_config(network),
        label_names=_label_names(where, source.pretrained_cfg, network.num_classes),
        source=source,
    )


def _model_words(where: str) -> str:
    """Give the words by which timm knows the model."""
    if where.startswith(("hf-hub:", "hf_hub:")):
        return where
    folder = Path(where.removeprefix("local-dir:")).expanduser()
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return f"local-dir:{candidate}"
    if folder.suffix in (".onnx", ".xml", ".bin") and folder.is_file():
        raise RequestError(
            f"{where} is a file for another runtime: expected the folder that it was exported from; docs/exporting.md "
            "says how it is used"
        )
    raise RequestError(
        f"{where} holds no trained model: expected the folder of a finished run, a folder with config.json and "
        f"{WEIGHTS}, or hf-hub:owner/repo"
    )


def _label_names(where: str, pretrained_cfg: dict[str, Any], classes: int) -> tuple[str, ...]:
    """Give the stated names; without any, ImageNet's for timm's own weights of it, else the numbers of the classes."""
    if classes < 1:
        raise RequestError(f"{where} gives features, as it has no classes: expected a classifier")
    stated = pretrained_cfg.get("label_names")
    if not stated:
        if classes == 1000 and str(pretrained_cfg.get("tag")).endswith("in1k"):
            return tuple(timm.data.ImageNetInfo().label_descriptions())
        return tuple(map(str, range(classes)))
    if isinstance(stated, dict):  # from a class number to a name, in JSON's strings
        stated = [stated.get(str(number)) for number in range(classes)]
    if len(stated) != classes or None in stated:
        raise RequestError(f"{where}: its label_names do not name each of its {classes} classes")
    return tuple(map(str, stated))
