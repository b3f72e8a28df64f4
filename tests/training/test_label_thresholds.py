"""Results on images with several labels agree with scikit-learn, and thresholds are the best ones."""

import numpy as np
import torch
from pytest import approx, fixture, mark
from sklearn.metrics import average_precision_score, f1_score, recall_score
from torch import nn
from torch.nn import functional as F

from resnext_hub.training.multi_label import MultiLabelEvaluation, choose_thresholds
from resnext_hub.training.objective import BinaryObjective


@fixture
def evaluation() -> MultiLabelEvaluation:
    """Results for 60 images and 5 labels, of which the last one never occurs."""
    generator = np.random.default_rng(0)
    labels = generator.random((60, 5)) < (0.5, 0.3, 0.1, 0.05, 0)
    probabilities = np.clip(generator.random((60, 5)) * 0.7 + 0.3 * labels, 0, 1).round(2)
    return MultiLabelEvaluation(
        indices=np.arange(60),
        labels=labels,
        probabilities=probabilities,
        losses=np.zeros(60),
        thresholds=choose_thresholds(labels, probabilities),
        unreadable=[],
        total=60,
    )


def test_figures_agree_with_scikit_learn(evaluation: MultiLabelEvaluation) -> None:
    labels, predictions = evaluation.labels[:, :4], evaluation.predictions[:, :4]
    probabilities = evaluation.probabilities[:, :4]
    assert evaluation.mean_average_precision == approx(average_precision_score(labels, probabilities, average="macro"))
    assert evaluation.macro_f1 == approx(f1_score(labels, predictions, average="macro"))
    assert evaluation.macro_recall == approx(recall_score(labels, predictions, average="macro"))
    assert evaluation.correct == (evaluation.labels == evaluation.predictions).all(axis=1).sum()
    assert evaluation.average_precisions[4] is None
    assert evaluation.recall_by_class(5)[4] is None


def test_no_other_threshold_has_a_better_f1_score(evaluation: MultiLabelEvaluation) -> None:
    for label in range(4):
        own, found = evaluation.labels[:, label], evaluation.probabilities[:, label]
        scores = [f1_score(own, found >= threshold, zero_division=0) for threshold in (*np.unique(found), 2.0)]
        assert f1_score(own, found >= evaluation.thresholds[label]) == approx(max(scores))
    assert evaluation.thresholds[4] == 0.5


def test_a_threshold_is_between_two_probabilities(evaluation: MultiLabelEvaluation) -> None:
    """Rounding of another loader must not change a prediction."""
    distances = np.abs(evaluation.probabilities - evaluation.thresholds)[:, :4]
    assert distances.min() > 0.004


@mark.parametrize(
    ("labels", "probabilities", "expected"),
    [
        ([1, 1, 0, 0], [0.9, 0.8, 0.3, 0.1], 0.55),
        ([1, 1, 1, 1], [0.9, 0.8, 0.6, 0.4], 0.2),
        ([1, 0, 1, 0], [0.7, 0.7, 0.7, 0.7], 0.35),
        ([0, 0, 0, 0], [0.9, 0.8, 0.3, 0.1], 0.5),
    ],
    ids=["separable", "always", "equal probabilities", "never"],
)
def test_thresholds_of_simple_cases(labels: list[int], probabilities: list[float], expected: float) -> None:
    found = choose_thresholds(np.array(labels, dtype=bool)[:, None], np.array(probabilities)[:, None])
    assert found.tolist() == [approx(expected)]


def test_the_loss_is_the_mean_binary_cross_entropy_with_targets_smoothed_towards_a_half() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(4, 3, 2, 2)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.3, 0.7, 0], [1, 1, 1]])
    for smoothing in (0.0, 0.2):
        loss, _ = BinaryObjective(model, smoothing)(images, targets)
        smoothed = targets * (1 - smoothing) + smoothing / 2
        probabilities = model(images).sigmoid()
        expected = -(smoothed * probabilities.log() + (1 - smoothed) * (1 - probabilities).log()).mean()
        torch.testing.assert_close(loss, expected)
    _, right = BinaryObjective(model, 0.0)(images, (model(images) > 0).float())
    assert right == 1.0


def test_binary_cross_entropy_of_exclusive_classes_agrees_with_timm() -> None:
    from timm.loss import BinaryCrossEntropy

    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(6, 3, 2, 2)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    mixed = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels.flip(0), 5)
    for smoothing in (0.0, 0.1):
        objective = BinaryObjective(model, smoothing, 1 / 5, exclusive=True)
        loss, right = objective(images, labels)
        torch.testing.assert_close(loss, BinaryCrossEntropy(smoothing=smoothing)(model(images), labels))
        assert right == (model(images).argmax(1) == labels).float().mean()
    loss, _ = BinaryObjective(model, 0.0, 1 / 5, exclusive=True)(images, mixed)
    torch.testing.assert_close(loss, BinaryCrossEntropy(smoothing=0.0)(model(images), mixed))
