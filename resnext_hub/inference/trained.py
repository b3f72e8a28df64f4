"""A trained model by the words that people use for it: a run folder, a model folder, or `hf-hub:owner/repo`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from resnext_hub.errors import RequestError
from resnext_hub.models.saved import CONFIG, WEIGHTS
from resnext_hub.models.source import ModelSource, find_model
from resnext_hub.text import printable


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model with its weights, and what it says of its input and its classes."""

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
    """Load a trained model.

    Args:
        where: A run folder, of which the `model` folder is taken; a folder with config.json and model.safetensors;
            `hf-hub:owner/repo[@revision]`.

    Raises:
        RequestError: If it is none of them, or cannot be loaded as it is.
        RunError: If the Hub cannot be reached.
    """
    source = find_model(_model_words(where), pretrained=True, where=where)
    saved = source.saved
    if saved.config.num_classes < 1:
        raise RequestError(f"{saved.where} gives features, as it has no classes: expected a classifier")
    return TrainedModel(
        network=saved.load(), data_config=saved.data_config, label_names=saved.label_names, source=source
    )


def _model_words(where: str) -> str:
    """Return the words by which a model is looked up."""
    if where.startswith(("hf-hub:", "hf_hub:")):
        return where
    folder = Path(where.removeprefix("local-dir:")).expanduser()
    for candidate in (folder / "model", folder):
        if os.path.isfile(candidate / CONFIG):  # False for a name that is too long as well
            return f"local-dir:{candidate}"
    if folder.suffix in (".onnx", ".xml", ".bin") and os.path.isfile(folder):
        raise RequestError(
            f"{printable(where)} is a file for another runtime: expected the folder that it was exported from; "
            "docs/exporting.md says how it is used"
        )
    raise RequestError(
        f"{printable(where)} holds no trained model: expected the folder of a finished run, a folder with {CONFIG} and "
        f"{WEIGHTS}, or hf-hub:owner/repo"
    )
