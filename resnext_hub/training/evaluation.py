"""Exact evaluation: the same counts for any number of processes and any training batch size.

The split is divided into batches in order. Each batch is computed by one process, at a fixed shape (the last batch is
padded), with the unwrapped model in float32. Each process stores its results in an array that is zero elsewhere, so the
sum over the processes is every sample's own value, bit for bit.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from resnext_hub.data.batches import Batch, Unreadable
from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.stream import StreamedEvaluation
from resnext_hub.errors import RunError, setting
from resnext_hub.models.views import TestTimeAugmentation, predict_views
from resnext_hub.text import printable
from resnext_hub.training.multi_label import MultiLabelEvaluation, choose_thresholds
from resnext_hub.training.temperature import calibration_error


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits of some of the evaluated images."""

    values: np.ndarray
    """`(M, classes)` float64; with test-time augmentation, the mean over the views."""
    labels: np.ndarray
    """Classes, `(M,)`."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results for each readable evaluation sample, as arrays `(N,)` in the order of the split."""

    indices: np.ndarray
    """Indices in the split."""
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray
    """Probability that the model assigns to its prediction."""
    losses: np.ndarray
    """Cross entropy in nats, without label smoothing."""
    ranks: np.ndarray
    """Number of classes ranked before the true one."""
    unreadable: list[Unreadable]
    """Images that this process could not read, and why; they are excluded from the arrays."""
    total: int
    """Size of the split, unreadable images included."""
    plain_predictions: np.ndarray | None = None
    """Predictions without test-time augmentation, if it was used."""
    logits: Logits | None = None
    """Logits of an evenly spaced subset of the images, if requested."""

    @property
    def count(self) -> int:
        """Number of readable samples."""
        return len(self.labels)

    @property
    def without_tta(self) -> float | None:
        """Top-1 accuracy without test-time augmentation, 0 to 1, if it was used."""
        plain = self.plain_predictions
        return None if plain is None else int((self.labels == plain).sum()) / self.count

    @property
    def correct(self) -> int:
        """Number of correct predictions."""
        return int((self.labels == self.predictions).sum())

    @property
    def top1(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return self.correct / self.count

    @property
    def top5(self) -> float:
        """Top-5 accuracy, 0 to 1."""
        return int((self.ranks < 5).sum()) / self.count

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats."""
        return float(self.losses.mean())

    @property
    def macro_f1(self) -> float:
        """F1 score, 0 to 1, averaged over the classes that occur among the labels."""
        from sklearn.metrics import f1_score

        measured = np.unique(self.labels)
        return float(f1_score(self.labels, self.predictions, labels=measured, average="macro", zero_division=0.0))

    @property
    def macro_recall(self) -> float:
        """Mean recall of the classes that occur among the labels, 0 to 1; also called balanced accuracy."""
        recalls = self.recall_by_class(int(self.labels.max()) + 1)
        return float(np.mean([recall for recall in recalls if recall is not None]))

    def recall_by_class(self, classes: int) -> list[float | None]:
        """Return the recall of each class, 0 to 1; None for a class that does not occur among the labels."""
        counts = np.bincount(self.labels, minlength=classes)
        correct = np.bincount(self.labels[self.labels == self.predictions], minlength=classes)
        pairs = zip(correct.tolist(), counts.tolist(), strict=True)
        return [right / count if count else None for right, count in pairs]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, 0 to 1: the mean gap between confidence and accuracy.

        It is computed over 15 bins of equal width, weighted by their number of samples (Guo et al., 2017, arXiv
        1706.04599).
        """
        return calibration_error(self.probabilities, self.labels == self.predictions)

    def confusion(self, classes: int) -> list[list[tuple[int, int]]]:
        """Return for each true class its `(predicted class, count)` pairs; pairs with count 0 are omitted."""
        pairs, counts = np.unique(self.labels * classes + self.predictions, return_counts=True)
        rows: list[list[tuple[int, int]]] = [[] for _ in range(classes)]
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            rows[pair // classes].append((pair % classes, count))
        return rows


AnyEvaluation = Evaluation | MultiLabelEvaluation
"""The results of an evaluation: of images with one label each, or with any number of them."""


class EvaluationStoppedError(Exception):
    """A process was asked to stop before the evaluation was complete."""


def _identity(values: torch.Tensor) -> torch.Tensor:
    return values


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    samples: EvaluationSamples | StreamedEvaluation,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = _identity,
    stop_requested: Callable[[], bool] = lambda: False,
    thresholds: np.ndarray | None = None,
    tta: TestTimeAugmentation = "none",
    keep_logits: int = 0,
) -> AnyEvaluation:
    """Evaluate a model once on every sample.

    Args:
        model: The unwrapped model, `(N, C, H, W)` float32 to logits `(N, classes)`; its mode is restored.
        samples: The evaluation samples.
        batch_size: Images per forward pass; the last batch is padded to it.
        device: Device of the model.
        workers: Data-loading workers.
        process: Index of this process.
        processes: Number of processes that share the work.
        sum_over_processes: Sums a float64 CPU tensor over the processes.
        stop_requested: Called before each batch; evaluation ends early if it returns True in any process.
        thresholds: Lowest probability at which each label is predicted, `(classes,)`, if an image can have several; the
            best ones for these samples if not given.
        tta: Test-time augmentation.
        keep_logits: Number of images whose logits are kept, if an image has one label.

    Raises:
        EvaluationStoppedError: In every process, if any was asked to stop.
        RunError: In every process, if no image is readable.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    unreadable: list[Unreadable] = []
    kept = _evenly_spaced(samples.count, keep_logits)
    stopped = 0.0
    was_training = model.training
    model.eval()
    batches = samples.batches(batch_size, process, processes, workers, pin_memory=device.type == "cuda")
    try:
        for batch in batches:
            if stop_requested():
                stopped = 1.0
                break
            columns, logits = _columns(model, batch, batch_size, device, tta)
            parts.append((batch.indices, columns, logits[torch.isin(batch.indices, kept)]))
            unreadable += batch.unreadable
    finally:
        batches.close()
        model.train(was_training)
    if sum_over_processes(torch.tensor([stopped], dtype=torch.float64)).item():
        raise EvaluationStoppedError
    labels = samples.labels if isinstance(samples, EvaluationSamples) else None
    plain = tta != "none"
    rows = 6 + plain if labels is None else 2 + labels.shape[1] * (1 + plain)
    values = torch.zeros(rows, samples.count, dtype=torch.float64)
    for indices, columns, _ in parts:
        values[:, indices] = columns
    summed = sum_over_processes(values).numpy()
    if not summed[0].any():
        raise RunError(_describe_unreadable(samples.count, unreadable), everywhere=True)
    results = _results(summed, labels, thresholds, unreadable)
    if not keep_logits or not isinstance(results, Evaluation):
        return results
    found = torch.zeros(len(kept), model.num_classes, dtype=torch.float64)  # type: ignore[call-overload] # timm's
    for indices, _, logits in parts:
        found[torch.isin(kept, indices)] = logits
    places = np.searchsorted(results.indices, readable := np.intersect1d(kept.numpy(), results.indices))
    table = sum_over_processes(found).numpy()[np.isin(kept.numpy(), readable)]
    return dataclasses.replace(results, logits=Logits(table, results.labels[places]))


def _evenly_spaced(count: int, most: int) -> torch.Tensor:
    """Return the ascending indices of up to `most` of a number of samples."""
    return torch.from_numpy(np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)))


def _results(
    values: np.ndarray, labels: np.ndarray | None, thresholds: np.ndarray | None, unreadable: list[Unreadable]
) -> AnyEvaluation:
    """Return the results of readable samples.

    Args:
        values: The results of `_columns` for all samples.
        labels: Which labels each sample has, if it can have several.
        thresholds: Lowest probability at which each label is predicted; the best ones if not given.
        unreadable: Images that this process could not read.
    """
    found, total = np.flatnonzero(values[0]), values.shape[1]
    if labels is not None:
        probabilities, *plain = (part.T.copy() for part in values[2:, found].reshape(-1, labels.shape[1], len(found)))
        return MultiLabelEvaluation(
            indices=found,
            labels=labels[found],
            probabilities=probabilities,
            losses=values[1, found],
            thresholds=choose_thresholds(labels[found], probabilities) if thresholds is None else thresholds,
            unreadable=unreadable,
            total=total,
            plain_probabilities=plain[0] if plain else None,
        )
    losses, label, prediction, probability, rank, *others = values[1:, found]
    return Evaluation(
        indices=found,
        labels=label.astype(np.int64),
        predictions=prediction.astype(np.int64),
        probabilities=probability.astype(np.float32),
        losses=losses,
        ranks=rank.astype(np.int64),
        unreadable=unreadable,
        total=total,
        plain_predictions=others[0].astype(np.int64) if others else None,
    )


def predict_batch(
    model: nn.Module, images: torch.Tensor, batch_size: int, device: torch.device, tta: TestTimeAugmentation = "none"
) -> torch.Tensor:
    """Return the logits of the views of at most `batch_size` images; their mean over the views is the prediction.

    Args:
        model: The unwrapped model, in evaluation mode.
        images: Normalized images, `(N, C, H, W)` float32.
        batch_size: Images per forward pass, to which a smaller batch is padded.
        device: Device of the model.
        tta: Test-time augmentation.

    Returns:
        `(views, N, classes)` float32, on the device of the model.
    """
    padded = F.pad(images, (0,) * 7 + (batch_size - len(images),)).to(device)
    return predict_views(model, padded, tta)[:, : len(images)]


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of mutually exclusive classes, float64 on the CPU."""
    return F.log_softmax(logits, dim=1).cpu().double()


def _columns(
    model: nn.Module, batch: Batch, batch_size: int, device: torch.device, tta: TestTimeAugmentation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the result of each sample consists of, and the logits `(N, classes)`, float64.

    The first is readability (0 or 1), loss, label, prediction, its probability and the rank of the label, `(6, N)` in
    total, or with several labels readability, loss and the probability of each label, `(2 + classes, N)`. With
    test-time augmentation, what is predicted without it follows.
    """
    views = predict_batch(model, batch.images, batch_size, device, tta)
    logits, plain = views.mean(dim=0), views[0]
    read = torch.ones(len(batch.indices), dtype=torch.float64)
    for index in (entry.index for entry in batch.unreadable):
        read[batch.indices == index] = 0.0
    if batch.labels.ndim == 2:
        scores = logits.cpu().double()
        every = F.binary_cross_entropy_with_logits(scores, batch.labels.double(), reduction="none")
        found = [scores] if tta == "none" else [scores, plain.cpu().double()]
        columns = [torch.stack([read, every.mean(dim=1)]), *(part.sigmoid().T for part in found)]
        return torch.cat(columns), scores
    logarithms = log_probabilities(logits)
    best, prediction = logarithms.max(dim=1)
    losses = F.nll_loss(logarithms, batch.labels, reduction="none")
    ranks = _ranks(logarithms, batch.labels).double()
    columns = [read, losses, batch.labels.double(), prediction.double(), best.exp(), ranks]
    if tta != "none":
        columns.append(log_probabilities(plain).argmax(dim=1).double())
    return torch.stack(columns), logits.cpu().double()


def _describe_unreadable(count: int, unreadable: list[Unreadable]) -> str:
    if count == 0:
        return f"the evaluation split is empty; choose another {setting('eval_split')}"
    first = f"; the first is {printable(unreadable[0].name)} ({unreadable[0].reason})" if unreadable else ""
    return (
        f"none of the {count} images of the evaluation split is readable{first}. Fix them, or choose another "
        f"{setting('eval_split')}"
    )


def _ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the number of classes ranked before the label, `(N,)`; ties go to the lower class index, as in argmax.

    Args:
        scores: Scores of the classes, `(N, classes)`.
        labels: True classes, `(N,)`.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
