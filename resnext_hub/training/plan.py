"""The plan of a run: a request, validated and resolved before anything is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_hub.data.splits import Splits
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.lookup import ModelSource
from resnext_hub.run_folder import RunFolder
from resnext_hub.training.balance import Balance
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved run, as built by `runs/request.py`."""

    config: TrainConfig
    """Resolved configuration; fields that were derived have their values."""
    source: ModelSource
    """The model to train, and its initial weights."""
    splits: Splits
    """The images to train and evaluate on."""
    input: InputConfig
    """Format of the images that the model takes."""
    schedule: Schedule
    balance: Balance
    """Class weights and frequencies."""
    precision: str
    """`no` (float32), `bf16` or `fp16`."""
    folder: RunFolder
    asked: dict[str, Any]
    """Settings that the user gave, without those of recipe and defaults."""
    recipe: str | None
    finished: bool
    """Whether the folder already holds this run, complete."""
    resume_from: Path | None
    """A fetched state to resume from, if the folder holds no checkpoint."""
    folder_state: tuple[str | None, ...]
    """`RunFolder.state` at the time of planning."""
