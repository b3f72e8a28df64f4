"""Class weights, logit adjustment and the choice of the best weights do what their formulas say."""

from pathlib import Path

import numpy as np
import torch
from long_tail import tail_of
from pytest import approx, mark, raises
from torch import nn
from torch.nn import functional as F

from resnext_hub.data.images import IndexedImages, StreamedImages
from resnext_hub.errors import RequestError
from resnext_hub.training.balance import (
    BETA,
    BalanceConfig,
    effective_numbers,
    is_imbalanced,
    resolve_balance,
)
from resnext_hub.training.evaluation import Evaluation
from resnext_hub.training.objective import Objective, weights_of
from resnext_hub.training.state import Best, score_of

NAMES = ("cat", "dog", "horse")


def images(*counts: int) -> IndexedImages:
    import datasets

    labels = np.repeat(np.arange(len(counts)), counts)
    rows = datasets.Dataset.from_dict({"image": [None] * len(labels)})
    return IndexedImages(rows, "image", np.arange(len(labels)), labels)


def test_the_effective_number_of_one_image_is_one_and_that_of_many_is_bounded() -> None:
    """Cui et al. (2019): (1 - beta^n) / (1 - beta)."""
    numbers = effective_numbers(np.array([1, 2, 1_000_000]))
    assert numbers.tolist() == approx([1.0, 1.0 + BETA, 1000.0])


def test_automatic_weights_are_inverse_to_effective_numbers_with_mean_1() -> None:
    weights = resolve_balance(BalanceConfig(class_weights="auto"), images(1000, 10, 100), NAMES).class_weights
    assert weights is not None
    assert weights.mean() == approx(1.0)
    products = weights * effective_numbers(np.array([1000, 10, 100]))
    assert products.tolist() == approx([products[0]] * 3)


def test_a_class_without_images_has_finite_weights_and_frequencies() -> None:
    for config in (BalanceConfig(class_weights="auto"), BalanceConfig(logit_adjustment=1.0)):
        balance = resolve_balance(config, images(10, 5), NAMES)
        found = balance.class_weights if balance.log_prior is None else balance.log_prior
        assert found is not None
        assert np.isfinite(found).all()


def test_nothing_is_corrected_by_default() -> None:
    balance = resolve_balance(BalanceConfig(), images(10, 5, 1), NAMES)
    assert (balance.class_weights, balance.log_prior, balance.digest) == (None, None, None)


def test_imbalance_is_a_ratio_of_ten() -> None:
    assert is_imbalanced(images(100, 10))
    assert not is_imbalanced(images(99, 10))


def written(folder: Path, text: str) -> BalanceConfig:
    (folder / "weights.yaml").write_text(text)
    return BalanceConfig(class_weights=str(folder / "weights.yaml"))


def test_weights_are_read_by_class_name(tmp_path: Path) -> None:
    config = written(tmp_path, "dog: 2.5\ncat: 0\nhorse: 1\n")
    balance = resolve_balance(config, images(1, 1, 1), NAMES)
    assert balance.class_weights is not None
    assert balance.class_weights.tolist() == [0.0, 2.5, 1.0]
    for text in ('"0": 1\n"1": 2\n', "0: 1\n1: 2\n"):
        numbers = resolve_balance(written(tmp_path, text), images(1, 1), ("0", "1")).class_weights
        assert numbers is not None
        assert numbers.tolist() == [1.0, 2.0]


@mark.parametrize(
    ("text", "message"),
    [
        ("cat: 1\ndog: 1\n", "has no weight for horse; expected a weight for each of the 3 classes"),
        ("cat: 1\ndog: 1\nhorse: 1\nmouse: 1\n", "has unknown classes: mouse"),
        ("cat: 1\ndog: -1\nhorse: 1\n", "the weight of dog is -1; expected 0 to 1e6"),
        ("cat: 1\ndog: true\nhorse: 1\n", "the weight of dog is True; expected 0 to 1e6"),
        ("cat: 0\ndog: 0\nhorse: 0\n", "all weights are 0; expected at least one positive weight"),
        ("- 1\n", "expected settings, one `name: value` per line"),
    ],
)
def test_a_file_of_weights_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with raises(RequestError) as caught:
        resolve_balance(written(tmp_path, text), images(1, 1, 1), NAMES)
    assert message in str(caught.value)
    assert str(caught.value).startswith("class_weights=")


def test_a_missing_file_of_weights_is_refused() -> None:
    with raises(RequestError, match=r"class_weights=nowhere\.yaml: nowhere\.yaml cannot be read: No such file"):
        resolve_balance(BalanceConfig(class_weights="nowhere.yaml"), images(1, 1, 1), NAMES)


@mark.parametrize(
    "settings",
    [
        {"class_weights": "auto", "sampling": "balanced"},
        {"class_weights": "auto", "logit_adjustment": 1.0},
        {"sampling": "balanced", "logit_adjustment": 0.5},
    ],
)
def test_two_corrections_of_one_imbalance_are_refused(settings: dict[str, object]) -> None:
    with raises(
        RequestError, match="correct for the same imbalance and would overcorrect together; use only one of them"
    ):
        BalanceConfig(**settings)


@mark.parametrize("settings", [{"class_weights": "auto"}, {"sampling": "balanced"}, {"logit_adjustment": 1.0}], ids=str)
def test_corrections_that_need_counts_are_refused_for_a_stream(settings: dict[str, object]) -> None:
    stream = StreamedImages((), "image", "label", NAMES)
    with raises(RequestError, match="needs the number of images of each class, which a stream does not provide"):
        resolve_balance(BalanceConfig(**settings), stream, NAMES)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


@mark.parametrize("mixed", [False, True])
@mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_is_the_same_for_any_micro_batches(mixed: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    pixels, labels = torch.randn(8, 3, 2, 2), torch.tensor([0, 0, 0, 1, 2, 0, 0, 1])
    targets = F.one_hot(labels, 3) * 0.7 + F.one_hot(labels.flip(0), 3) * 0.3 if mixed else labels
    objective = Objective(model, smoothing, WEIGHTS)
    total = weights_of(targets, WEIGHTS).sum()

    def gradient(*sizes: int) -> torch.Tensor:
        model.zero_grad()
        for pixel, target in zip(pixels.split(sizes), targets.split(sizes), strict=True):
            objective(pixel, target, total)[0].backward()
        return model[1].weight.grad.clone()

    for sizes in ((3, 3, 2), (1,) * 8):
        torch.testing.assert_close(gradient(*sizes), gradient(8))
    if not mixed:
        losses = F.cross_entropy(model(pixels), labels, label_smoothing=smoothing, reduction="none")
        reference = (losses * WEIGHTS[labels]).sum() / WEIGHTS[labels].sum()
        torch.testing.assert_close(objective(pixels, labels, total)[0], reference)
        if not smoothing:
            torch.testing.assert_close(reference, F.cross_entropy(model(pixels), labels, WEIGHTS))


def test_a_class_of_weight_0_has_no_loss() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    objective = Objective(model, 0.1, torch.tensor([0.0, 1.0, 1.0]))
    loss, _ = objective(torch.randn(2, 3, 2, 2), torch.tensor([0, 0]), torch.tensor(1e-12))
    assert loss == 0


@mark.parametrize("correction", ["weights", "adjustment"])
def test_label_smoothing_does_not_make_a_rare_class_win(correction: str) -> None:
    """A model of two separable classes, 100 to 1, is right about both, as without a correction."""
    torch.manual_seed(0)
    counts = np.array([1000, 10])
    pixels = torch.cat([torch.randn(1000, 4) + 3, torch.randn(10, 4) - 3])
    labels = torch.tensor([0] * 1000 + [1] * 10)
    if correction == "weights":
        weights = torch.tensor(1 / counts, dtype=torch.float32)
        objective = Objective(nn.Linear(4, 2), 0.1, weights)
        total = weights_of(labels, weights).sum()
    else:
        objective = Objective(nn.Linear(4, 2), 0.1, None, torch.tensor(np.log(counts / 1010), dtype=torch.float32), 1.0)
        total = None
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss, _ = objective(pixels, labels, total)
        loss.backward()
        optimizer.step()
    right = objective.model(pixels).argmax(dim=1) == labels
    assert right[:1000].float().mean() > 0.99
    assert right[1000:].float().mean() > 0.99


def test_logit_adjustment_adds_the_log_frequencies_in_training_only() -> None:
    torch.manual_seed(0)
    balance = resolve_balance(BalanceConfig(logit_adjustment=1.0), images(70, 20, 10), NAMES)
    assert balance.log_prior is not None
    assert np.exp(balance.log_prior).tolist() == approx([0.7, 0.2, 0.1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    pixels, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 2])
    prior = torch.tensor(balance.log_prior, dtype=torch.float32)
    loss, top1 = Objective(model, 0.0, None, prior, 2.0)(pixels, labels)
    torch.testing.assert_close(loss, F.cross_entropy(model(pixels) + 2 * prior, labels))
    assert top1 == (model(pixels).argmax(dim=1) == labels).float().mean()


def evaluation(labels: list[int], predictions: list[int], loss: float = 1.0) -> Evaluation:
    size = len(labels)
    return Evaluation(
        indices=np.arange(size),
        labels=np.array(labels),
        predictions=np.array(predictions),
        probabilities=np.full(size, 0.5, np.float32),
        losses=np.full(size, loss),
        ranks=np.zeros(size, np.int64),
        unreadable=[],
        total=size,
    )


def test_macro_recall_is_the_mean_over_the_classes_that_occur() -> None:
    found = evaluation([0, 0, 0, 0, 2, 2], [0, 0, 0, 1, 2, 0])
    assert found.recall_by_class(4) == [0.75, None, 0.5, None]
    assert found.macro_recall == 0.625


@mark.parametrize(
    ("best_by", "better"), [("top1", "common"), ("macro-recall", "fair"), ("macro-f1", "fair"), ("loss", "sure")]
)
def test_the_best_weights_are_chosen_by_the_requested_metric(best_by: str, better: str) -> None:
    labels = [0] * 8 + [1, 2]
    candidates = {
        "common": evaluation(labels, [0] * 10, loss=0.9),
        "fair": evaluation(labels, [0] * 5 + [1, 1, 2] + [1, 2], loss=0.8),
        "sure": evaluation(labels, [0] * 3 + [1] * 7, loss=0.5),
    }
    scores = {name: score_of(found, best_by) for name, found in candidates.items()}
    assert max(scores, key=lambda name: scores[name]) == better


def test_of_equal_scores_the_lower_loss_is_better() -> None:
    best = Best(step=1, score=0.5, correct=3, loss=1.0, epoch=1.0, tensors={})
    assert best.beaten_by(0.5, 0.9)
    assert not best.beaten_by(0.5, 1.0)
    assert not best.beaten_by(0.4, 0.1)


def test_a_long_tail_keeps_every_class_in_proportion() -> None:
    labels = np.repeat(np.arange(10), 1000)
    kept = tail_of(labels, 100)
    assert np.bincount(labels[kept]).tolist() == [1000, 599, 359, 215, 129, 77, 46, 28, 17, 10]
    assert (np.diff(kept) > 0).all()
