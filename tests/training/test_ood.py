"""The score of out-of-distribution images is what other libraries compute, and tells such images from others."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytest import approx, fixture, importorskip, mark, raises
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from support.processes import TINY, run_process

from resnext_hub.data.sources import load_digits_table
from resnext_hub.errors import RequestError
from resnext_hub.files import sha256_of
from resnext_hub.inference.classifier import load
from resnext_hub.record import RunRecord
from resnext_hub.runs.ood_facts import _crops
from resnext_hub.training.ood import build_score, principal


@fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model that can tell digits."""
    folder = tmp_path_factory.mktemp("ood") / "run"
    flags = (*TINY, "--image-size", 32, "--epochs", 3, "--batch-size", 64, "--lr", 0.01)
    done = run_process("scripts/train.py", *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def drawn(seed: int = 0, count: int = 600) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features `(N, 20)` of four classes that vary in few directions, their labels, and logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    means = 6 * torch.eye(20)[:4] + 3
    spread = torch.cat([torch.full((5,), 2.0), torch.full((15,), 0.3)])
    features = means[labels] + spread * torch.randn(count, 20, generator=generator)
    return features, labels, features @ torch.randn(20, 4, generator=torch.Generator().manual_seed(1))


def test_both_parts_are_those_of_pytorch_ood() -> None:
    detectors = importorskip("pytorch_ood.detector")
    features, labels, logits = drawn()
    score = build_score(features.numpy(), labels.numpy(), features.numpy(), logits.numpy())
    new, _, answers = drawn(2)
    distance, energy = score.parts(answers, new)
    referee = detectors.Mahalanobis(None).fit_features(features, labels)
    within = referee.cov / len(features)
    typical = within.diagonal().mean()
    referee.precision = torch.linalg.inv(within + typical * torch.eye(20))
    expected = (2 * typical * referee.predict_features(new)).log()
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(energy, detectors.EnergyBased.score(answers))


def test_the_variance_of_few_directions_is_measured_and_of_the_others_neglected() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.full((3,), 5.0), torch.full((197,), 0.1)]).double()
    values = spread * torch.randn(1000, 200, generator=generator, dtype=torch.float64)
    variances, directions = principal(values - values.mean(dim=0))
    assert variances.shape == (64,)
    torch.testing.assert_close(directions @ directions.T, torch.eye(64, dtype=torch.float64))
    assert variances[:3].tolist() == approx([25] * 3, rel=0.2)
    assert directions[:3, 3:].abs().max() < 0.05


def test_5_percent_of_the_held_out_images_have_a_score_above_0() -> None:
    features, labels, _ = drawn()
    held_out, _, answers = drawn(2)
    score = build_score(features.numpy(), labels.numpy(), held_out.numpy(), answers.numpy())
    assert float((score(answers, held_out) > 0).float().mean()) == approx(0.05, abs=0.002)


def test_a_class_without_images_and_features_that_never_vary_are_no_problem() -> None:
    features, labels, logits = drawn()
    features[:, 7] = 0
    features = features[labels != 2]
    score = build_score(features.numpy(), labels[labels != 2].numpy(), features.numpy(), logits[labels != 2].numpy())
    assert len(score.centers) == 3
    assert score(logits[labels != 2], features).isfinite().all()


def test_the_card_states_the_auroc_that_pytorch_ood_computes_from_the_scores_of_predict(run: Path) -> None:
    metrics = importorskip("pytorch_ood.metrics").OODMetrics
    record, classifier = RunRecord.load(run / "record.json"), load(run)
    rows = load_digits_table().train_test_split(test_size=360, seed=0)["test"]
    own = [entry["bytes"] for entry in rows["image"]]
    found = classifier.predict([*own, *_crops()], top=1)
    scores = torch.tensor([prediction.ood_score for prediction in found])
    labels = torch.cat([torch.zeros(len(own)), -torch.ones(len(scores) - len(own))])
    (facts,) = record.ood
    referee = metrics()
    referee.update(scores, labels)
    # other digits than those of the run, so only nearly equal
    assert facts.auroc == approx(float(referee.compute()["AUROC"]), abs=0.02)
    assert facts.auroc > max(facts.max_softmax_auroc, 0.95)
    assert facts.images == 250
    assert facts.flagged == int((scores[len(own) :] > 0).sum())
    text = (run / "model" / "README.md").read_text()
    assert f"| {facts.auroc:.3f} | {facts.max_softmax_auroc:.3f} | {facts.flagged} of 250 |" in text


def test_left_out_classes_are_told_from_others_better_than_by_the_largest_probability(run: Path) -> None:
    """The features of a model for all digits, with the score and the logits of eight of them."""
    metrics = importorskip("sklearn.metrics")
    classifier = load(run)
    rows = load_digits_table()
    images, labels = [entry["bytes"] for entry in rows["image"]], np.array(rows["label"])
    features = classifier.embed(images).numpy()
    head: Any = classifier.model.get_classifier()
    logits = (torch.from_numpy(features) @ head.weight[:8].detach().T + head.bias[:8].detach()).numpy()
    known = labels < 8
    fit, held_out = known & (np.arange(len(labels)) % 3 > 0), known & (np.arange(len(labels)) % 3 == 0)
    score = build_score(features[fit], labels[fit], features[fit], logits[fit])
    rest = held_out | ~known
    found = score(torch.from_numpy(logits[rest]), torch.from_numpy(features[rest])).numpy()
    plain = -softmax(logits[rest], axis=1).max(axis=1)
    auroc, of_plain = (metrics.roc_auc_score(~known[rest], values) for values in (found, plain))
    assert auroc > of_plain
    assert auroc > 0.9


def test_a_model_loads_without_the_file_and_not_with_another_one(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    assert load(folder).ood is not None
    tensors = load_file(folder / "ood.safetensors")
    tensors["mean"][0] += 1
    save_file(tensors, folder / "ood.safetensors")
    with raises(RequestError, match=r"ood\.safetensors does not match its SHA-256 in config\.json"):
        load(folder)
    (folder / "ood.safetensors").unlink()
    classifier = load(folder)
    assert classifier.ood is None
    (prediction,) = classifier.predict(np.zeros((8, 8), np.uint8))
    assert prediction.ood_score is None


@mark.parametrize("change", ["missing", "shape", "infinite"])
def test_a_file_that_contains_no_score_is_refused(change: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    tensors = load_file(folder / "ood.safetensors")
    if change == "missing":
        del tensors["shrink"]
    elif change == "shape":
        tensors["centers"] = tensors["centers"][:, 1:].contiguous()
    else:
        tensors["standard"][0] = torch.inf
    save_file(tensors, folder / "ood.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["resnext_hub"]["ood_sha256"] = sha256_of(folder / "ood.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with raises(RequestError, match="does not contain the tensors of an OOD score"):
        load(folder)


def test_an_image_of_none_of_the_classes_has_a_higher_score(run: Path) -> None:
    classifier = load(run)
    rows = load_digits_table()
    own = classifier.predict([entry["bytes"] for entry in rows["image"][:50]])
    others = classifier.predict(_crops()[:50])
    assert np.quantile([prediction.ood_score for prediction in own], 0.8) < 0
    assert np.quantile([prediction.ood_score for prediction in others], 0.2) > 0
