"""What a run will do: a request that was validated and resolved, once, before anything is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_hub.data.splits import Splits
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.lookup import ModelSource
from resnext_hub.run_folder import RunFolder
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved run. `runs/request.py` makes it; training and everything after it read it."""

    config: TrainConfig
    """Resolved: no field is left open."""
    source: ModelSource
    """The model to start from."""
    splits: Splits
    """What to train and evaluate on."""
    input: InputConfig
    """The images that the model takes."""
    schedule: Schedule
    precision: str
    """`no` (float32), `bf16` or `fp16`."""
    folder: RunFolder
    asked: dict[str, Any]
    """The settings given by the user, on top of recipe and defaults."""
    recipe: str | None
    finished: bool
    """Whether the folder holds this very run, complete."""
    resume_from: Path | None
    """A fetched state to resume, if the folder holds no checkpoint."""
    folder_state: tuple[str | None, ...]
    """`RunFolder.state` when the folder was looked at."""
