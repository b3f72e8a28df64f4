"""Read the stored predictions of a run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnext_hub.errors import RequestError, one_line
from resnext_hub.text import printable


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predictions for the readable images of a split, in its order."""

    indices: np.ndarray
    """Indices in the split, `(N,)`."""
    labels: np.ndarray
    """Classes, `(N,)`, or which labels each image has, `(N, classes)` bool."""
    predictions: np.ndarray
    """The same for what is predicted."""
    probabilities: np.ndarray
    """Probability of the prediction, `(N,)`, or of each label, `(N, classes)`."""

    @property
    def several(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels.ndim == 2

    @property
    def wrong(self) -> np.ndarray:
        """Whether each prediction is wrong, `(N,)` bool; with several labels, whether any is."""
        differs = np.asarray(self.labels != self.predictions)
        return np.asarray(differs.any(axis=1)) if self.several else differs

    @property
    def confident_mistakes(self) -> np.ndarray:
        """Places of the wrong predictions, the most confident one first."""
        places = np.flatnonzero(self.wrong)
        return places[np.argsort(-self._wrongness[places], kind="stable")]

    @property
    def doubtful_hits(self) -> np.ndarray:
        """Places of the correct predictions, the least confident one first."""
        places = np.flatnonzero(~self.wrong)
        return places[np.argsort(-self._wrongness[places], kind="stable")]

    @property
    def _wrongness(self) -> np.ndarray:
        """A number that is the higher the more certain a wrong prediction is, and the less certain a correct one."""
        if not self.several:
            return np.where(self.wrong, self.probabilities, -self.probabilities)
        own = np.where(self.labels, self.probabilities, 1 - self.probabilities)
        return np.asarray(-np.log(own.clip(1e-12)).mean(axis=1))


def read_predictions(path: Path, classes: int, several: bool, count: int) -> Predictions:
    """Read predictions.parquet or test-predictions.parquet.

    Args:
        path: The file.
        classes: Number of classes.
        several: Whether an image can have several labels.
        count: Size of the split.

    Raises:
        RequestError: If the file is missing or damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        columns = {name: table.column(name) for name in ("index", "label", "prediction", "probability")}
        indices = columns["index"].to_numpy().astype(np.int64)
        if several:
            labels, predictions = (_as_sets(columns[name].to_pylist(), classes) for name in ("label", "prediction"))
            probabilities = np.array(columns["probability"].to_pylist(), dtype=np.float64).reshape(-1, classes)
        else:
            labels, predictions = (columns[name].to_numpy().astype(np.int64) for name in ("label", "prediction"))
            probabilities = columns["probability"].to_numpy().astype(np.float64)
    except FileNotFoundError as error:
        raise RequestError(f"{printable(path.name)} is missing") from error
    except (OSError, pyarrow.ArrowException, LookupError, ValueError, TypeError) as error:
        raise RequestError(f"{printable(path.name)} is damaged ({one_line(error)})") from error
    found = Predictions(indices=indices, labels=labels, predictions=predictions, probabilities=probabilities)
    _require_fit(found, path, classes, count)
    return found


def _as_sets(rows: list[list[int]], classes: int) -> np.ndarray:
    """Return lists of labels as `(N, classes)` bool."""
    sets = np.zeros((len(rows), classes), dtype=bool)
    for row, own in enumerate(rows):
        sets[row, own] = True
    return sets


def _require_fit(found: Predictions, path: Path, classes: int, count: int) -> None:
    """Raise RequestError unless the predictions are those of a split and its classes."""
    ranges = [(found.indices, count), (found.probabilities, 1 + 1e-6)]
    if not found.several:
        ranges += [(found.labels, classes), (found.predictions, classes)]
    holds = len(found.indices) > 0
    for values, end in ranges:
        holds = holds and len(values) == len(found.indices) and bool((values >= 0).all() and (values < end).all())
    if not holds:
        raise RequestError(f"{printable(path.name)} does not match record.json of the run")
