"""The classifier is fitted to cached features as a logistic regression, and the result can be averaged with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from pytest import approx, fixture, mark, raises
from safetensors.torch import load_file
from support.digit_pairs import write_pairs
from support.processes import TINY, run_process, save_with_timm, write_images
from support.runs import kill_at, lines, weights, without_clock

import resnext_hub
from resnext_hub.cli.main import main
from resnext_hub.errors import RequestError
from resnext_hub.record import RunRecord
from resnext_hub.training import fit_head
from resnext_hub.training.averaging import StartAverage
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.features import sampled

Command = Callable[..., tuple[int, str, str]]

FLAGS = (*TINY, "--image-size", 32, "--batch-size", 48, "--fit-head", "--hflip", 0)


@fixture(scope="module")
def start(tmp_path_factory: object) -> Path:
    """Weights to start from, in timm's layout."""
    return save_with_timm(tmp_path_factory.mktemp("start") / "model", "test_resnet", 32)  # type: ignore[attr-defined]


@fixture(scope="module")
def probed(start: Path, tmp_path_factory: object) -> Path:
    """A run that trained nothing but the classifier."""
    run: Path = tmp_path_factory.mktemp("probed") / "run"  # type: ignore[attr-defined]
    words = ("train", *FLAGS, "--model", f"local-dir:{start}", "--epochs", 0, "--output-dir", run)
    assert main([str(word) for word in words]) == 0
    return run


def test_without_epochs_only_the_classifier_changes_and_it_is_evaluated(start: Path, probed: Path) -> None:
    before, after = timm.create_model(f"local-dir:{start}", pretrained=True).state_dict(), weights(probed)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]
    record = RunRecord.load(probed / "record.json")
    assert (record.steps, record.evaluation.step) == (0, 0)
    assert record.evaluation.top1 > 0.8  # random features of digits are good ones
    assert [line["step"] for line in lines(probed / "metrics.jsonl")] == [0]


def test_without_steps_nothing_is_said_to_have_chosen_the_weights_and_no_curves_are_drawn(
    probed: Path, command: Command
) -> None:
    card = (probed / "model" / "README.md").read_text()
    assert "Only the classifier was trained, by logistic regression on features of the training images." in card
    assert "they were not selected by any evaluation" in card
    assert "optimistic" not in card
    assert "0 steps" not in card
    assert not (probed / "plots" / "curves.png").exists()
    assert not (probed / "model" / "plots" / "curves.png").exists()
    code, _, err = command("report", probed)
    assert code == 0, err
    page = (probed / "plots" / "report" / "report.html").read_text()
    assert "Curves are not shown: only the classifier was fitted, so there were no training steps." in page


def test_the_classifier_is_scikit_learns_logistic_regression_on_embeddings(probed: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from resnext_hub.data.config import DataConfig
    from resnext_hub.data.splits import load_splits

    splits = load_splits(DataConfig(dataset="digits"))
    calibration = RunRecord.load(probed / "record.json").calibration
    assert calibration is not None
    classifier = replace(resnext_hub.load(str(probed)), temperature=1 / calibration.temperature)
    train, held_out = (
        classifier.embed([images.image(index) for index in range(len(images))]).double().numpy()
        for images in (splits.train, splits.eval)
    )
    scaler = StandardScaler().fit(train)
    guesses = []
    for strength in fit_head.STRENGTHS:
        solver = LogisticRegression(C=strength, max_iter=1000, tol=1e-7).fit(
            scaler.transform(train), splits.train.labels
        )
        guesses.append(solver.predict_proba(scaler.transform(held_out)))
    found = classifier([splits.eval.image(index) for index in range(len(splits.eval))]).numpy()
    assert min(np.abs(found - guess).mean() for guess in guesses) < 0.002  # the second closest differs by 0.03


def test_a_finished_run_of_the_classifier_goes_on_with_all_layers(
    start: Path, tmp_path: Path, command: Command, probed: Path
) -> None:
    words = ("--model", f"local-dir:{start}", "--output-dir", tmp_path / "run", "--lr", 1e-3)
    for epochs, steps in ((0, 0), (0.5, 15)):
        code, out, err = command("train", *FLAGS, *words, "--epochs", epochs)
        assert code == 0, err
        assert RunRecord.load(tmp_path / "run" / "record.json").steps == steps
    code, out, err = command("train", *FLAGS, *words, "--epochs", 0.5)
    assert "is already finished" in out


def test_a_killed_run_is_fitted_once_and_resumes_bit_for_bit(start: Path, tmp_path: Path, command: Command) -> None:
    flags = (
        *FLAGS, "--model", f"local-dir:{start}", "--max-steps", 30, "--eval-every", 0.3, "--checkpoint-every", 6,
        "--log-samples", "--lr", 1e-5, "--average-with-start", 0.4, "--ema", 0.9, "--freeze", 1,
    )  # fmt: skip
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    for step in (2, 15):  # before and after the first checkpoint
        killed = tmp_path / f"killed-{step}"
        kill_at(step, killed, *flags)
        code, _, err = command("train", *flags, "--output-dir", killed)
        assert code == 0, err
        assert ("fitting the classifier" in err) == (step == 2)
        for name, tensor in weights(tmp_path / "whole").items():
            assert torch.equal(tensor, weights(killed)[name]), name
        assert without_clock(lines(killed / "metrics.jsonl")) == without_clock(
            lines(tmp_path / "whole" / "metrics.jsonl")
        )


def test_the_published_weights_are_the_average_of_trained_and_initial_ones(
    start: Path, tmp_path: Path, command: Command
) -> None:
    flags = (*TINY, "--image-size", 32, "--batch-size", 48, "--model", f"local-dir:{start}", "--max-steps", 8)
    code, _, err = command(
        "train", *flags, "--average-with-start", 0.25, "--no-calibrate", "--output-dir", tmp_path / "run"
    )
    assert code == 0, err
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    trained, first = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "start"))
    before = timm.create_model(f"local-dir:{start}", pretrained=True).state_dict()
    assert torch.equal(first["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])
    assert not torch.equal(first["layer4.0.conv1.weight"], trained["layer4.0.conv1.weight"])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "averaged with the initial weights, whose coefficient in the average is 0.25" in card
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, trained[name].lerp(first[name], 0.25) if tensor.is_floating_point() else tensor)


def test_an_average_without_a_start_is_the_model_itself() -> None:
    model = torch.nn.Linear(2, 2)
    average = StartAverage(0.5)
    assert average.of(model) is model
    average.keep_start(model)
    kept = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    average.keep_start(model)  # the first start stays
    assert torch.allclose(average.of(model).weight, kept + 0.5)
    assert torch.allclose(model.weight, kept + 1)


def test_several_labels_are_fitted_one_by_one(start: Path, tmp_path: Path, command: Command) -> None:
    data = write_pairs(tmp_path / "pairs", {"train": 300, "test": 100})
    words = ("--dataset", data, "--model", f"local-dir:{start}", "--epochs", 0, "--output-dir", tmp_path / "run")
    code, _, err = command("train", *FLAGS, *words)
    assert code == 0, err
    found = RunRecord.load(tmp_path / "run" / "record.json").evaluation.mean_average_precision
    assert found is not None
    assert found > 0.5  # 0.19 if labels are ranked at random


def test_a_class_without_images_is_never_predicted(start: Path, tmp_path: Path, command: Command) -> None:
    for shade, name in enumerate(("dark", "gray", "light")):
        write_images(tmp_path / "data" / "train" / name, 6, 40 + 80 * shade)
        write_images(tmp_path / "data" / "val" / name, 3, 45 + 80 * shade)
    for path in (tmp_path / "data" / "train" / "gray").iterdir():
        path.write_bytes(b"")  # only unreadable images
    words = ("--dataset", tmp_path / "data", "--model", f"local-dir:{start}", "--epochs", 0, "--max-bad-fraction", 1)
    code, _, err = command("train", *FLAGS, *words, "--output-dir", tmp_path / "run")
    assert code == 0, err
    confusion = RunRecord.load(tmp_path / "run" / "record.json").evaluation.confusion
    assert all(label != 1 for row in confusion for label, _ in row)
    assert sum(dict(row).get(label, 0) for label, row in enumerate(confusion)) >= 5


@mark.slow
def test_two_processes_fit_what_one_does(probed: Path, start: Path, tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint")
    words = (*launch, "localhost:0", "scripts/train.py", *FLAGS, "--model", f"local-dir:{start}", "--epochs", 0)
    done = run_process(*words, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(probed).items():
        assert tensor.numpy() == approx(weights(tmp_path / "run")[name].numpy(), rel=1e-3, abs=0.05)  # up to 711
    one, two = (RunRecord.load(run / "record.json").evaluation for run in (probed, tmp_path / "run"))
    assert two.correct == one.correct


def test_images_beyond_the_limit_are_sampled() -> None:
    assert sampled(100, 500, 0).tolist() == list(range(100))
    rows = sampled(600, 500, 0)
    assert len(set(rows.tolist())) == 500
    assert (np.diff(rows) > 0).all()


@mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0.0}, r"^epochs=0 trains nothing; use more epochs, or fit_head=True"),
        ({"fit_head": True, "head_epochs": 1.0}, r"^fit_head=True and head_epochs=1.0 both train the classifier"),
        ({"fit_head": True, "streaming": True}, r"^fit_head=True reads the training images before the first step"),
        ({"average_with_start": 1.0}, r"^average_with_start=1.0"),
    ],
)
def test_requests_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with raises(RequestError, match=message):
        TrainConfig.from_flat(settings)


@mark.parametrize(
    ("flags", "message"),
    [
        (("--fit-head",), "--fit-head freezes layers at their initial values, which are random here"),
        (("--average-with-start", 0.5), "--average-with-start 0.5 averages with initial weights, which are random"),
    ],
)
def test_random_weights_have_no_features_to_fit_or_to_average_with(
    tmp_path: Path, command: Command, flags: tuple[object, ...], message: str
) -> None:
    code, _, err = command("train", *TINY, "--image-size", 32, *flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert message in err
