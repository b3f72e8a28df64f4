"""Results of a model on images that can have several labels."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from resnext_hub.data.batches import Unreadable
from resnext_hub.training.temperature import calibration_error


@dataclass(frozen=True, eq=False)
class MultiLabelEvaluation:
    """Results for each readable evaluation sample, in the order of the split."""

    indices: np.ndarray
    """Indices in the split, `(N,)`."""
    labels: np.ndarray
    """Which labels each image has, `(N, classes)` bool."""
    probabilities: np.ndarray
    """Probability of each label, `(N, classes)` float64."""
    losses: np.ndarray
    """Binary cross entropy in nats, the mean over the labels, without label smoothing; `(N,)`."""
    thresholds: np.ndarray
    """Lowest probability at which each label is predicted, `(classes,)`."""
    unreadable: list[Unreadable]
    """Images that this process could not read, and why; they are excluded from the arrays."""
    total: int
    """Size of the split, unreadable images included."""
    plain_probabilities: np.ndarray | None = None
    """Probabilities without test-time augmentation, if it was used."""

    @property
    def count(self) -> int:
        """Number of readable samples."""
        return len(self.labels)

    @property
    def loss(self) -> float:
        """Mean binary cross entropy in nats."""
        return float(self.losses.mean())

    @cached_property
    def predictions(self) -> np.ndarray:
        """Which labels are predicted for each image, `(N, classes)` bool."""
        return np.asarray(self.probabilities >= self.thresholds)

    @property
    def correct(self) -> int:
        """Number of images whose predicted labels are exactly the true ones."""
        return int((self.predictions == self.labels).all(axis=1).sum())

    @property
    def top1(self) -> float:
        """Fraction of images whose predicted labels are exactly the true ones, 0 to 1."""
        return self.correct / self.count

    @property
    def positives(self) -> np.ndarray:
        """Number of images with each label, `(classes,)`."""
        return np.asarray(self.labels.sum(axis=0))

    @property
    def predicted(self) -> np.ndarray:
        """Number of images for which each label is predicted, `(classes,)`."""
        return np.asarray(self.predictions.sum(axis=0))

    @property
    def true_positives(self) -> np.ndarray:
        """Number of images for which each label is predicted correctly, `(classes,)`."""
        return np.asarray((self.predictions & self.labels).sum(axis=0))

    @property
    def macro_f1(self) -> float:
        """F1 score, 0 to 1, averaged over the labels that occur."""
        measured = self.positives > 0
        scores = 2 * self.true_positives[measured] / (self.predicted + self.positives)[measured]
        return float(scores.mean()) if measured.any() else 0.0

    @property
    def macro_recall(self) -> float:
        """Mean recall of the labels that occur, 0 to 1."""
        recalls = [recall for recall in self.recall_by_class(self.labels.shape[1]) if recall is not None]
        return float(np.mean(recalls)) if recalls else 0.0

    def recall_by_class(self, classes: int) -> list[float | None]:
        """Return the recall of each of the labels, 0 to 1; None for one that does not occur."""
        pairs = zip(self.true_positives.tolist(), self.positives.tolist(), strict=True)
        return [right / count if count else None for right, count in pairs]

    @cached_property
    def average_precisions(self) -> list[float | None]:
        """Average precision of each label, 0 to 1: that of all thresholds; None for a label that does not occur."""
        from sklearn.metrics import average_precision_score

        columns = zip(self.labels.T, self.probabilities.T, strict=True)
        return [float(average_precision_score(own, found)) if own.any() else None for own, found in columns]

    @property
    def mean_average_precision(self) -> float:
        """Mean of the average precisions of the labels that occur, 0 to 1."""
        found = [value for value in self.average_precisions if value is not None]
        return float(np.mean(found)) if found else 0.0

    @property
    def without_tta(self) -> float | None:
        """Mean average precision without test-time augmentation, 0 to 1, if it was used."""
        plain = self.plain_probabilities
        return None if plain is None else replace(self, probabilities=plain).mean_average_precision

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, 0 to 1: the mean gap between the probability of a label and its frequency.

        Over 15 bins of equal width, weighted by their number of pairs of an image and a label.
        """
        return calibration_error(self.probabilities.ravel(), self.labels.ravel())


def choose_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return for each label the threshold of its probability with the best F1 score, `(classes,)` float64.

    A threshold is in the middle between two probabilities, so that rounding does not change a prediction. It is 0.5 for
    a label that no image has, and of equally good ones the one that is closest to 0.5.

    Args:
        labels: Which labels each image has, `(N, classes)` bool.
        probabilities: Probability of each label, `(N, classes)`.
    """
    chosen = np.full(labels.shape[1], 0.5)
    for label in np.flatnonzero(labels.any(axis=0)):
        order = np.argsort(-probabilities[:, label], kind="stable")
        found, own = probabilities[order, label].astype(np.float64), labels[order, label]
        cuts = np.flatnonzero(np.diff(found, append=-1.0))  # equal probabilities stay together
        scores = 2 * np.cumsum(own)[cuts] / (cuts + 1 + own.sum())
        middles = (found[cuts] + np.append(found, 0.0)[cuts + 1]) / 2
        best = np.flatnonzero(scores == scores.max())
        chosen[label] = middles[best[np.argmin(np.abs(middles[best] - 0.5))]]
    return chosen
