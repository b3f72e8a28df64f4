"""Open a finished run again: its record, its settings and its dataset."""

from dataclasses import dataclass
from pathlib import Path

from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError
from resnext_hub.hub.publish import require_config
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.existing import read_config
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run whose model folder matches its record."""

    folder: RunFolder
    record: RunRecord
    config: TrainConfig

    def load_splits(self) -> Splits:
        """Open the dataset of the run.

        Raises:
            RequestError: If it is missing or has changed.
        """
        splits = load_splits(self.config.data)
        expected = self.record.dataset.fingerprint
        if splits.fingerprint != expected:
            raise RequestError(
                f"{printable(self.config.data.dataset)} has changed since the run: its fingerprint is "
                f"{splits.fingerprint[:16]}, expected {expected[:16]}"
            )
        return splits


def reopen(path: Path) -> FinishedRun:
    """Read the record and the settings of a finished run.

    Args:
        path: The run folder.

    Raises:
        RequestError: If the folder holds no finished run, or its settings or its model are missing or damaged.
    """
    folder = RunFolder(path)
    record = RunRecord.load(folder.record)
    settings = read_config(folder)
    if not settings:
        raise RequestError(f"{printable(folder)} has no config.yaml, so its dataset is unknown; restore the file")
    require_config(folder.model, record)
    return FinishedRun(folder=folder, record=record, config=TrainConfig.from_flat(settings))
