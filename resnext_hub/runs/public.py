"""The settings of a run as they may be published: without paths of this machine."""

from pathlib import Path
from typing import Any

from resnext_hub.data.splits import Splits
from resnext_hub.models.lookup import local_name
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig


def public_settings(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """Return the flat settings of a run, with local paths reduced to the folder's own name."""
    return config.to_flat() | {"dataset": printable(splits.dataset_id), "model": public_model(config.model)}


def public_model(requested: str) -> str:
    """Return a requested model without the path of a local one."""
    kind, _, place = requested.partition(":")
    return f"local-dir:{local_name(Path(place))}" if kind == "local-dir" else printable(requested)
