"""Evaluation gives the same integers however the work is shared out."""

import numpy as np
import timm
import torch
from pytest import mark

from resnext_hub.data.dataset import DataConfig, load_splits
from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.transforms import build_eval_transform
from resnext_hub.training.evaluate import Evaluation, evaluate

INPUT = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)


def digits() -> EvaluationSamples:
    return EvaluationSamples(load_splits(DataConfig()).eval, build_eval_transform(INPUT))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).to(memory_format=torch.channels_last).train()


def shared(processes: int, batch_size: int) -> Evaluation:
    """Evaluate as so many processes would, one after the other, and add their arrays up."""
    model, samples, parts = network(), digits(), []

    def keep(values: torch.Tensor) -> torch.Tensor:
        parts.append(values)
        return torch.stack(parts).sum(dim=0)

    for process in range(processes):
        result = evaluate(
            model,
            samples,
            batch_size=batch_size,
            device=torch.device("cpu"),
            process=process,
            processes=processes,
            sum_over_processes=keep,
        )
    assert model.training
    return result


@mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_values_to_the_bit(processes: int) -> None:
    one, many = shared(1, 32), shared(processes, 32)
    assert one.count == 360
    for field in ("labels", "predictions", "probabilities", "losses"):
        assert np.array_equal(getattr(one, field), getattr(many, field)), field
    assert one.loss == many.loss


def test_the_padded_tail_does_not_count() -> None:
    whole, tailed = shared(1, 360), shared(1, 50)
    assert (whole.correct, whole.count) == (tailed.correct, tailed.count)
    np.testing.assert_allclose(whole.losses, tailed.losses, rtol=1e-4)  # float32 moves with the shape


def test_values_are_those_of_a_plain_forward_pass() -> None:
    model, samples = network().eval(), digits()
    images = torch.stack([samples[i].image for i in range(32)]).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = model(images)
    result = shared(1, 32)
    labels = torch.from_numpy(result.labels[:32])
    assert np.array_equal(result.predictions[:32], logits.argmax(1).numpy())
    np.testing.assert_allclose(
        result.losses[:32], torch.nn.functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-6
    )


def test_confusion_counts_true_classes_in_rows() -> None:
    labels, predictions = np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2])
    result = Evaluation(
        indices=np.arange(4),
        labels=labels,
        predictions=predictions,
        probabilities=np.ones(4),
        losses=np.zeros(4),
        unreadable=[],
    )
    assert result.confusion(3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert (result.correct, result.top1) == (3, 0.75)
