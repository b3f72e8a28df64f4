"""The settings of a run in publishable form, without local paths."""

from pathlib import Path
from typing import Any

from resnext_hub.data.splits import Splits
from resnext_hub.models.lookup import local_name
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig


def public_settings(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """Return the flat settings of a run, with local paths reduced to the name of the folder."""
    exclude, weights = config.data.exclude, config.balance.class_weights
    return config.to_flat() | {
        "dataset": printable(splits.dataset_id),
        "model": public_model(config.model),
        "exclude": None if exclude is None else printable(Path(exclude).name),
        "class_weights": printable(Path(weights).name),
    }


def public_model(requested: str) -> str:
    """Return the requested model, with a local path reduced to the name of the folder."""
    kind, _, path = requested.partition(":")
    return f"local-dir:{local_name(Path(path))}" if kind == "local-dir" else printable(requested)
