"""Evaluation returns the same counts however the work is divided."""

import numpy as np
import timm
import torch
from pytest import mark, raises

from resnext_hub.data.config import DataConfig
from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.splits import load_splits
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.views import TestTimeAugmentation
from resnext_hub.training.evaluation import Evaluation, EvaluationStoppedError, evaluate

INPUT = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)


def digits() -> EvaluationSamples:
    return EvaluationSamples(load_splits(DataConfig()).eval, EvalTransform(InputConfig.resolve(INPUT)))


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).to(memory_format=torch.channels_last).train()


def evaluate_with(processes: int, batch_size: int, tta: TestTimeAugmentation = "none") -> Evaluation:
    """Evaluate as that number of processes would, one after the other, and sum their arrays."""
    model, samples, parts = build_model(), digits(), []

    def keep(values: torch.Tensor) -> torch.Tensor:
        parts.append(values)
        return sum(part for part in parts if part.shape == values.shape)

    for process in range(processes):
        result = evaluate(
            model,
            samples,
            batch_size=batch_size,
            device=torch.device("cpu"),
            process=process,
            processes=processes,
            sum_over_processes=keep,
            tta=tta,
        )
    assert model.training
    return result


@mark.parametrize(("processes", "tta"), [(2, "none"), (3, "none"), (4, "none"), (3, "flip")])
def test_results_are_equal_bit_for_bit_for_any_number_of_processes(processes: int, tta: TestTimeAugmentation) -> None:
    one, many = evaluate_with(1, 32, tta), evaluate_with(processes, 32, tta)
    assert one.count == 360
    assert one.without_tta == many.without_tta
    assert (one.without_tta is None) == (tta == "none")
    for field in ("labels", "predictions", "probabilities", "losses", "ranks"):
        assert np.array_equal(getattr(one, field), getattr(many, field)), field
    assert one.loss == many.loss


def test_padding_of_the_last_batch_does_not_count() -> None:
    exact, padded = evaluate_with(1, 360), evaluate_with(1, 50)
    assert (exact.correct, exact.count) == (padded.correct, padded.count)
    np.testing.assert_allclose(exact.losses, padded.losses, rtol=1e-4)  # float32 rounding depends on the shape


def test_results_equal_those_of_a_plain_forward_pass() -> None:
    model, samples = build_model().eval(), digits()
    images = torch.stack([samples[i].image for i in range(32)]).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = model(images)
    result = evaluate_with(1, 32)
    labels = torch.from_numpy(result.labels[:32])
    assert np.array_equal(result.predictions[:32], logits.argmax(1).numpy())
    np.testing.assert_allclose(
        result.losses[:32], torch.nn.functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-6
    )


def test_confusion_has_true_classes_in_rows() -> None:
    labels, predictions = np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2])
    result = Evaluation(
        indices=np.arange(4),
        labels=labels,
        predictions=predictions,
        probabilities=np.ones(4),
        losses=np.zeros(4),
        ranks=np.array([0, 1, 0, 0]),
        unreadable=[],
        total=0,
    )
    assert result.confusion(3) == [[(0, 1), (2, 1)], [(1, 1)], [(2, 1)]]
    assert (result.correct, result.top1) == (3, 0.75)


def test_top5_macro_f1_and_rank_agree_with_scikit_learn() -> None:
    from sklearn.metrics import f1_score, top_k_accuracy_score

    model, samples = build_model().eval(), digits()
    images = torch.stack([samples[i].image for i in range(360)]).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in images.split(36)]).numpy()
    result = evaluate_with(1, 36)
    assert result.top5 == top_k_accuracy_score(result.labels, logits, k=5)
    assert result.macro_f1 == f1_score(result.labels, logits.argmax(1), average="macro", zero_division=0.0)
    assert np.array_equal(result.ranks == 0, result.labels == result.predictions)


def test_ties_go_to_the_lower_class_index() -> None:
    class Constant(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 10)

    result = evaluate(Constant(), digits(), batch_size=60, device=torch.device("cpu"))
    assert np.array_equal(result.ranks, result.labels)
    assert set(result.predictions) == {0}


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    probabilities = np.array([0.9] * 10 + [0.65] * 4)  # two of the fifteen bins
    correct = np.array([1] * 7 + [0] * 3 + [1, 1, 0, 0])
    result = Evaluation(
        indices=np.arange(14),
        labels=np.ones(14, dtype=np.int64),
        predictions=correct,
        probabilities=probabilities,
        losses=np.zeros(14),
        ranks=1 - correct,
        unreadable=[],
        total=0,
    )
    assert np.isclose(result.calibration_error, (10 * abs(0.9 - 0.7) + 4 * abs(0.65 - 0.5)) / 14)


def test_a_stop_request_to_one_process_stops_all() -> None:
    with raises(EvaluationStoppedError):
        evaluate(
            build_model(),
            digits(),
            batch_size=60,
            device=torch.device("cpu"),
            stop_requested=iter([False, True]).__next__,
        )
    with raises(EvaluationStoppedError):  # another process was asked to stop
        evaluate(
            build_model(),
            digits(),
            batch_size=60,
            device=torch.device("cpu"),
            sum_over_processes=lambda values: values + 1,
        )
