"""The published weights give calibrated probabilities, and calibration changes nothing else."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from pyarrow import parquet
from pytest import LogCaptureFixture, TempPathFactory, approx, fixture, importorskip
from support.processes import TINY, run_process
from support.runs import weights

from resnext_hub.data.config import DataConfig
from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.sources import load_digits_table
from resnext_hub.data.splits import load_splits
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.inference.classifier import load
from resnext_hub.models.input_config import InputConfig
from resnext_hub.record import RunRecord
from resnext_hub.training.calibrate import fold
from resnext_hub.training.evaluation import Evaluation, evaluate

FLAGS = (*TINY, "--image-size", 32, "--epochs", 3, "--batch-size", 64, "--lr", 0.01, "--test-fraction", 0.2)


@fixture(scope="module")
def runs(tmp_path_factory: TempPathFactory) -> dict[str, Path]:
    """The same run with and without calibration."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("calibrated", ()), ("plain", ("--no-calibrate",))):
        done = run_process("scripts/train.py", *FLAGS, *flags, "--output-dir", folder / name)
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in ("calibrated", "plain")}


def test_only_the_classifier_is_divided_and_only_by_the_temperature(runs: dict[str, Path]) -> None:
    record = RunRecord.load(runs["calibrated"] / "record.json")
    assert record.calibration is not None
    temperature = record.calibration.temperature
    assert abs(temperature - 1) > 0.05
    assert record.calibration.images == record.evaluation.count
    plain = weights(runs["plain"])
    for name, tensor in weights(runs["calibrated"]).items():
        torch.testing.assert_close(tensor, plain[name] / temperature if name.startswith("fc.") else plain[name])


def test_no_prediction_changes_and_probabilities_become_more_accurate(runs: dict[str, Path]) -> None:
    calibrated, plain = (RunRecord.load(runs[name] / "record.json") for name in ("calibrated", "plain"))
    assert plain.calibration is None
    assert plain.evaluation.uncalibrated_error is None
    for file in ("predictions.parquet", "test-predictions.parquet"):
        tables = [parquet.read_table(runs[name] / file) for name in ("calibrated", "plain")]
        assert tables[0]["prediction"].equals(tables[1]["prediction"])
        assert not tables[0]["probability"].equals(tables[1]["probability"])
    for part in ("evaluation", "test"):
        after, before = getattr(calibrated, part), getattr(plain, part)
        assert after.confusion == before.confusion
        assert after.loss < before.loss
        assert after.uncalibrated_error == approx(before.calibration_error, abs=1e-5)


def test_the_card_shows_the_reliability_before_and_after_calibration(runs: dict[str, Path]) -> None:
    record = RunRecord.load(runs["calibrated"] / "record.json")
    assert "reliability.png" in record.plots
    assert record.test is not None
    assert record.test.uncalibrated_error is not None
    errors = [f"{100 * error:.2f} %" for error in (record.test.uncalibrated_error, record.test.calibration_error)]
    card = (runs["calibrated"] / "model" / "README.md").read_text()
    alt = (
        f"Reliability diagrams of the test images: calibration error {errors[0]} before calibration, {errors[1]} after"
    )
    assert f"![{alt}](plots/reliability.png)" in card
    with Image.open(runs["calibrated"] / "model" / "plots" / "reliability.png") as image:
        image.verify()
    assert "reliability.png" not in RunRecord.load(runs["plain"] / "record.json").plots
    assert "reliability.png" not in (runs["plain"] / "model" / "README.md").read_text()


def test_stock_timm_gives_the_calibrated_probabilities(runs: dict[str, Path]) -> None:
    record = RunRecord.load(runs["calibrated"] / "record.json")
    assert record.calibration is not None
    model = timm.create_model(f"local-dir:{runs['calibrated'] / 'model'}", pretrained=True).eval()
    plain = load(str(runs["plain"])).model
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = (plain(images) / record.calibration.temperature).softmax(dim=1)
        torch.testing.assert_close(model(images).softmax(dim=1), expected, rtol=1e-4, atol=1e-6)


def test_the_pipeline_of_transformers_gives_the_calibrated_probabilities(runs: dict[str, Path]) -> None:
    transformers = importorskip("transformers")
    classify = transformers.pipeline("image-classification", model=str(runs["calibrated"] / "model"), device="cpu")
    images = [Image.open(io.BytesIO(entry["bytes"])).convert("RGB") for entry in load_digits_table()["image"][:20]]
    calibrated, plain = (load(runs[name]).predict(images, top=10) for name in ("calibrated", "plain"))
    for image, expected, uncalibrated in zip(images, calibrated, plain, strict=True):
        scores = {answer["label"]: answer["score"] for answer in classify(image, top_k=10)}
        assert scores == approx({guess.label: guess.probability for guess in expected.guesses}, abs=1e-5)
        assert abs(scores[expected.guesses[0].label] - uncalibrated.guesses[0].probability) > 1e-5


def test_a_temperature_that_would_change_a_prediction_is_undone(caplog: LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)
    samples = EvaluationSamples(load_splits(DataConfig()).eval, EvalTransform(InputConfig.resolve(config)))
    measure = partial(evaluate, samples=samples, batch_size=32, device=torch.device("cpu"))
    before = measure(model)
    assert isinstance(before, Evaluation)
    assert fold(model, 1e45, before, measure) is None  # all logits become zero
    assert "would change predicted classes" in caplog.text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    after = fold(model, 2.0, before, measure)
    assert after is not None
    assert np.array_equal(after.predictions, before.predictions)
