"""With `--tta flip`, evaluation and prediction average the logits of an image and its mirror image."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from pytest import TempPathFactory, fixture, mark, raises
from sklearn.metrics import average_precision_score
from support.digit_pairs import write_pairs
from support.processes import TINY, run_process

from resnext_hub import api
from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import load
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

FLAGS = (*TINY, "--tta", "flip", "--lr", 0.02)


@fixture(scope="module")
def run(tmp_path_factory: TempPathFactory) -> Path:
    """A run on the digits, trained without mirror images, which it therefore classifies differently."""
    folder = tmp_path_factory.mktemp("runs") / "flipped"
    flags = ("--max-steps", 40, "--log-every", 20, "--test-fraction", 0.1, "--split-seed", 1, "--hflip", 0)
    done = run_process("scripts/train.py", *FLAGS, *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "--tta flip evaluates mirror images, but with --hflip 0 the model is not trained on any" in done.stderr
    return folder


@fixture(scope="module")
def splits() -> Splits:
    return load_splits(DataConfig(test_fraction=0.1, split_seed=1))


@torch.inference_mode()
def views(run: Path, images: IndexedImages, color: str = "RGB") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of images and of their mirror images, by stock timm alone."""
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    stacked = torch.stack([transform(images.image(index, color)) for index in range(len(images))])
    return model(stacked), model(stacked.flip(-1))


@mark.parametrize("part", ["evaluation", "test"])
def test_counts_equal_those_of_a_loop_with_stock_timm(run: Path, splits: Splits, part: str) -> None:
    record, images = RunRecord.load(run / "record.json"), splits.evaluated[part]
    facts = record.evaluation if part == "evaluation" else record.test
    assert facts is not None
    assert isinstance(images, IndexedImages)
    plain, mirrored = views(run, images)
    labels = torch.as_tensor(images.labels)
    predicted = ((plain + mirrored) / 2).argmax(dim=1)
    expected = torch.zeros(10, 10, dtype=torch.int64).index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    assert facts.matrix.tolist() == expected.tolist()
    assert facts.without_tta == int((plain.argmax(dim=1) == labels).sum()) / len(images)
    assert facts.without_tta != facts.top1  # otherwise equal counts would prove little


def test_every_evaluation_of_the_run_uses_it_and_evaluate_repeats_the_counts(run: Path, command: Command) -> None:
    record = RunRecord.load(run / "record.json")
    best = max(line["eval_correct"] for line in record.history if "eval_correct" in line)
    assert best == record.evaluation.correct
    assert record.config["tta"] == yaml.safe_load((run / "config.yaml").read_text())["tta"] == "flip"
    code, out, err = command("evaluate", run, "--threads", 1)
    assert code == 0, err
    assert out.count("the counts of every class match") == 2
    assert api.evaluate(run, threads="1").without_tta == record.evaluation.without_tta


def test_predict_repeats_the_evaluation_unless_it_is_told_otherwise(
    run: Path, splits: Splits, command: Command, tmp_path: Path
) -> None:
    images = splits.eval
    assert isinstance(images, IndexedImages)
    paths = [tmp_path / f"{index:03d}.png" for index in range(len(images))]
    for index, path in enumerate(paths):
        images.image(index).save(path)
    recorded = parquet.read_table(run / "predictions.parquet").to_pydict()

    def predicted(*flags: str) -> list[dict]:
        code, out, err = command("predict", run, tmp_path, "--json", "--threads", 1, *flags)
        assert code == 0, err
        return [json.loads(line)["predictions"][0] for line in out.splitlines()]

    found = predicted()
    assert [guess["index"] for guess in found] == recorded["prediction"]
    assert np.float32([guess["probability"] for guess in found]).tolist() == recorded["probability"]
    assert predicted("--tta", "flip") == found
    plain, mirrored = views(run, images)
    alone = predicted("--tta", "none")
    assert [guess["index"] for guess in alone] == plain.argmax(dim=1).tolist()
    classifier = load(run)
    assert classifier.tta == "flip"
    both = classifier([Image.open(path) for path in paths])
    assert torch.allclose(both, ((plain + mirrored) / 2).double().softmax(dim=1), atol=1e-5)
    assert torch.allclose(replace(classifier, tta="none")(paths), plain.double().softmax(dim=1), atol=1e-5)
    with raises(RequestError, match=r"^tta=twice: expected none or flip$"):
        replace(classifier, tta="twice")


def test_the_card_states_both_figures(run: Path) -> None:
    card, record = (run / "model" / "README.md").read_text(), RunRecord.load(run / "record.json")
    assert record.test is not None
    assert record.test.without_tta is not None
    assert f"({record.test.correct}/{record.test.count})** with test-time augmentation on test images" in card
    figure = f"{100 * record.test.without_tta:.2f} %"
    assert f"**Stock timm uses the image alone, with a different result: accuracy {figure}.**" in card
    metrics = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    values = {metric["name"]: metric["value"] for metric in reversed(metrics)}  # those of the test come first
    assert values["Top-1 accuracy"] == record.test.top1
    assert values["Top-1 accuracy without test-time augmentation"] == record.test.without_tta


def test_the_model_folder_can_be_published_and_states_it(run: Path, command: Command) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["resnext_hub"]["tta"] == "flip"
    assert load(run / "model").tta == "flip"
    code, _, err = command("push", run, "--repo-id", "me/digits", "--license", "mit", "--dry-run")
    assert code == 0, err


def test_an_unknown_augmentation_in_a_config_is_refused_by_name(run: Path, tmp_path: Path, command: Command) -> None:
    for path in (run / "model").glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((run / "model" / "config.json").read_text())
    config["resnext_hub"]["tta"] = "ten-crop"
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = command("predict", tmp_path, run / "plots" / "samples.png")
    assert code == 2
    assert "resnext_hub.tta" in err
    assert "ten-crop" in err


def test_several_labels_are_averaged_as_well(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", {"train": 320, "validation": 120})
    folder = tmp_path / "run"
    flags = ("--dataset", pairs, "--image-size", 32, "--batch-size", 32, "--max-steps", 30, "--hflip", 0)
    done = run_process("scripts/train.py", *FLAGS, *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    images, facts = load_splits(DataConfig(dataset=str(pairs))).eval, RunRecord.load(folder / "record.json").evaluation
    assert isinstance(images, IndexedImages)
    assert facts.labels is not None
    plain, mirrored = (logits.double() for logits in views(folder, images))
    probabilities = ((plain + mirrored) / 2).sigmoid().numpy()
    predicted = probabilities >= np.array([label.threshold for label in facts.labels])
    assert [label.true_positives for label in facts.labels] == (predicted & images.labels).sum(axis=0).tolist()

    def mean(found: np.ndarray) -> float:
        return float(
            np.mean([average_precision_score(own, p) for own, p in zip(images.labels.T, found.T, strict=True)])
        )

    assert facts.mean_average_precision is not None
    assert abs(facts.mean_average_precision - mean(probabilities)) < 1e-6
    assert facts.without_tta is not None
    assert abs(facts.without_tta - mean(plain.sigmoid().numpy())) < 1e-6
    assert facts.without_tta != facts.mean_average_precision
    assert "with a different result: mean average precision" in (folder / "model" / "README.md").read_text()
    found = load(folder)([images.image(index) for index in range(8)])
    assert torch.allclose(found, torch.tensor(probabilities[:8]), atol=1e-5)


def test_verify_averages_the_views_as_the_run_did(run: Path, command: Command) -> None:
    code, out, err = command("verify", run, "--threads", 1)
    assert code == 0, out + err
    record = RunRecord.load(run / "record.json")
    assert record.test is not None
    for part, facts in (("evaluation", record.evaluation), ("test", record.test)):
        assert facts.without_tta != facts.top1
        counts = f"{facts.correct}/{facts.count}"
        assert re.search(rf"^{part}: correct +{counts} +{counts} +ok$", out, re.MULTILINE)
