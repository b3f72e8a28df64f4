"""Images with several labels: every promise that holds for one label per image holds for them."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pytest import TempPathFactory, approx, fixture, mark
from support import warm_start
from support.client import Client
from support.digit_pairs import write_pairs
from support.loopback_hub import LoopbackHub, serve
from support.processes import TINY, run_interpreter, run_process
from support.runs import kill_at, lines, weights, without_clock

from resnext_hub import api
from resnext_hub.data.config import DataConfig
from resnext_hub.data.splits import load_splits
from resnext_hub.record import RunRecord
from resnext_hub.training.multi_label import MultiLabelEvaluation

Command = Callable[..., tuple[int, str, str]]

FLAGS = (*TINY, "--image-size", 32, "--batch-size", 32, "--lr", 0.01, "--hflip", 0, "--scale", 0.8, 1)


@fixture(scope="module")
def pairs(tmp_path_factory: TempPathFactory) -> Path:
    counts = {"train": 640, "validation": 160, "test": 120}
    return write_pairs(tmp_path_factory.mktemp("multi-label") / "pairs", counts)


@fixture(scope="module")
def run(pairs: Path, tmp_path_factory: TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pairs-run"
    done = run_process(
        "scripts/train.py", *FLAGS, "--dataset", pairs, "--epochs", 8, "--lr", 0.02, "--output-dir", folder
    )
    assert done.returncode == 0, done.stderr
    assert "10 labels, of which a training image has 1.9 on average" in done.stderr
    assert re.search(r"^mAP \d\d\.\d\d % \(160 held-out images\)$", done.stdout, re.MULTILINE)
    return folder


@fixture
def hub() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server


def test_the_weights_with_the_best_mean_average_precision_are_recorded_with_results_of_each_label(run: Path) -> None:
    record = RunRecord.load(run / "record.json")
    evaluations = [line for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert record.evaluation.mean_average_precision == max(line["eval_map"] for line in evaluations)
    assert record.evaluation.mean_average_precision > 0.4  # a guess has 0.19
    assert record.test is not None
    assert record.evaluation.labels is not None
    assert record.test.labels is not None
    assert record.label_names == [f"d{digit}" for digit in range(10)]
    # the test uses the thresholds that were chosen on the evaluation split
    thresholds = [label.threshold for label in record.evaluation.labels]
    assert [label.threshold for label in record.test.labels] == thresholds
    assert json.loads((run / "model" / "config.json").read_text())["resnext_hub"]["thresholds"] == thresholds
    assert (record.config["label_smoothing"], record.config["best_by"]) == (0.0, "map")
    assert record.plots == ["curves.png", "labels.png"]


def test_stock_timm_reproduces_the_counts_of_every_label(run: Path, pairs: Path) -> None:
    import timm

    record = RunRecord.load(run / "record.json")
    splits = load_splits(DataConfig(dataset=str(pairs)))
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert splits.test is not None
    for images, facts in ((splits.eval, record.evaluation), (splits.test, record.test)):
        assert facts is not None
        assert facts.labels is not None
        stacked = torch.stack([transform(images.image(index)) for index in range(len(images))])
        with torch.inference_mode():
            probabilities = model(stacked).double().sigmoid().numpy()
        predicted = probabilities >= np.array([label.threshold for label in facts.labels])
        assert [label.predicted for label in facts.labels] == predicted.sum(axis=0).tolist()
        assert [label.true_positives for label in facts.labels] == (predicted & images.labels).sum(axis=0).tolist()
        assert facts.correct == (predicted == images.labels).all(axis=1).sum()
        assert facts.count == len(images)


def test_evaluate_repeats_the_counts_of_both_splits(run: Path, command: Command) -> None:
    code, out, err = command("evaluate", run)
    assert code == 0, err
    assert len(re.findall(r"^(?:test )?mAP .* the counts of every class match$", out, re.MULTILINE)) == 2
    found = api.evaluate(run, split="test")
    assert isinstance(found, MultiLabelEvaluation)
    record = RunRecord.load(run / "record.json")
    assert record.test is not None
    assert found.mean_average_precision == record.test.mean_average_precision


CLASSIFY = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], top_k=10)
found = classify(sys.argv[2])
print(json.dumps({entry["label"]: entry["score"] for entry in found}))
assert "resnext_hub" not in sys.modules
"""


def test_a_published_model_has_the_same_scores_in_timm_and_transformers_pipeline(
    run: Path, pairs: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    words = ("scripts/push.py", run, "--repo-id", "me/pairs", "--license", "mit")
    done = run_interpreter(*words, HF_HOME=str(tmp_path / "home"), **hub.environment())
    assert done.returncode == 0, done.stderr
    files = hub.repos["models/me/pairs"].commits[-1].files
    assert {"plots/labels.png", "plots/curves.png"} <= files.keys()
    assert "plots/confusion_matrix.png" not in files
    image = load_splits(DataConfig(dataset=str(pairs))).eval.image(3)
    image.save(tmp_path / "image.png")

    import timm

    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model(transform(image)[None]).sigmoid()[0].tolist()
    assert sum(expected) != approx(1.0)
    classified = warm_start.run(
        [sys.executable, "-c", CLASSIFY, str(run / "model"), str(tmp_path / "image.png")], cwd=tmp_path
    )
    assert classified.returncode == 0, classified.stderr
    scores = json.loads(classified.stdout.splitlines()[-1])
    assert [scores[f"d{digit}"] for digit in range(10)] == approx(expected, abs=1e-5)

    client = Client(hub, tmp_path / "other-home")
    snippets = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert len(snippets) == 4
    result = (
        "\nresult = [[str(name) for name in timm_labels], [g.label for g in labels[0].guesses], classify('image.png')]"
    )
    code = "\n".join([snippets[0], "timm_labels = labels", *snippets[1:]])
    answer = client.run(f"import os; os.chdir({str(tmp_path)!r})\n{code}{result}")
    client.close()
    assert answer["code"] == 0, answer["err"]
    by_timm, by_classifier, by_pipeline = answer["result"]
    assert sorted(by_timm) == sorted(by_classifier)
    assert by_pipeline[0]["score"] == approx(max(expected), abs=1e-5)


def test_predict_gives_the_labels_from_their_thresholds_on(
    run: Path, pairs: Path, tmp_path: Path, command: Command
) -> None:
    images = load_splits(DataConfig(dataset=str(pairs))).eval
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        images.image(index).save(folder / f"{index:02}.png")
    code, out, err = command("predict", run, folder, "--json")
    assert code == 0, err
    found = [json.loads(line)["predictions"] for line in out.splitlines()]
    evaluation = api.evaluate(run)
    assert isinstance(evaluation, MultiLabelEvaluation)
    expected = [{f"d{label}" for label in np.flatnonzero(row)} for row in evaluation.predictions[:40]]
    assert [{guess["label"] for guess in guesses} for guesses in found] == expected
    assert all(guesses == sorted(guesses, key=lambda guess: -guess["probability"]) for guesses in found)
    code, out, _ = command("predict", run, folder, "--json", "--top", 3)
    assert {len(json.loads(line)["predictions"]) for line in out.splitlines()} == {3}


def test_a_run_that_is_killed_resumes_bit_for_bit(pairs: Path, tmp_path: Path, command: Command) -> None:
    flags = (
        *FLAGS, "--dataset", pairs, "--max-steps", 40, "--eval-every", 0.5, "--checkpoint-every", 7, "--log-samples",
        "--mixup", 0.2,
    )  # fmt: skip
    assert command("train", *flags, "--output-dir", tmp_path / "whole")[0] == 0
    kill_at(17, tmp_path / "killed", *flags)
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    assert "resuming from step-000000" in err
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(tmp_path / "killed" / name)) == without_clock(lines(tmp_path / "whole" / name))


@mark.slow
def test_pixels_loss_and_counts_are_the_same_for_any_number_of_processes_and_micro_batches(
    pairs: Path, tmp_path: Path
) -> None:
    """With layer norm, as batch norm sees only the part of a batch that a process has."""
    flags = (
        *FLAGS, "--model", "test_convnext", "--dataset", pairs, "--max-steps", 4, "--log-every", 1, "--log-samples",
        "--workers", 1,
    )  # fmt: skip
    start = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d")
    words = {
        "two": (*start, "--rdzv_endpoint", "localhost:0", "scripts/train.py", *flags),
        "one": ("scripts/train.py", *flags),
        "micro": ("scripts/train.py", *flags, "--micro-batch-size", 7),
    }
    losses, pixels, records = {}, {}, {}
    for name, arguments in words.items():
        done = run_process(*arguments, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        losses[name] = [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
        parts = [lines(path) for path in sorted((tmp_path / name).glob("samples-*.jsonl"))]
        pixels[name] = [[pixel for line in step for pixel in line["pixels"]] for step in zip(*parts, strict=True)]
        records[name] = RunRecord.load(tmp_path / name / "record.json").evaluation
    assert pixels["one"] == pixels["two"] == pixels["micro"]
    for name in ("two", "micro"):
        assert losses[name] == approx(losses["one"], rel=1e-4), name
        assert records[name].mean_average_precision == approx(records["one"].mean_average_precision, rel=1e-3)


@mark.parametrize(
    ("flags", "message"),
    [
        (("--sampling", "balanced"), "--sampling balanced needs exactly one label per image"),
        (("--class-weights", "auto"), "--class-weights auto needs exactly one label per image"),
        (("--logit-adjustment", 1), "--logit-adjustment 1.0 needs exactly one label per image"),
        (("--best-by", "top1"), "--best-by top1 needs exactly one label per image"),
        (("--streaming",), "--streaming supports only one label per image"),
    ],
)
def test_settings_for_one_label_per_image_are_refused_by_name(
    pairs: Path, tmp_path: Path, command: Command, flags: tuple[object, ...], message: str
) -> None:
    code, _, err = command("train", *FLAGS, "--dataset", pairs, *flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_map_is_refused_for_one_label_per_image(tmp_path: Path, command: Command) -> None:
    code, _, err = command("train", *FLAGS, "--best-by", "map", "--output-dir", tmp_path / "run")
    assert code == 2
    assert "--best-by map is for images that can have several labels" in err


def test_commands_for_one_label_per_image_are_refused_by_name(
    run: Path, pairs: Path, tmp_path: Path, command: Command
) -> None:
    for words, message in (
        (("check", run), "wrong labels can only be found if each image has one"),
        (("export", run, "--format", "onnx", "--int8", "--output", tmp_path / "m.onnx"), "export in float32"),
        (
            ("study", "cardinality", "--dataset", pairs),
            "choose a dataset with one label",
        ),
    ):
        code, _, err = command(*words)
        assert code == 2, err
        assert message in err


def test_an_exported_file_states_thresholds_and_what_the_logits_mean(
    run: Path, tmp_path: Path, command: Command
) -> None:
    import onnxruntime

    code, _, err = command("export", run, "--format", "onnx", "--raw", "--output", tmp_path / "pairs.onnx")
    assert code == 0, err
    facts = onnxruntime.InferenceSession(tmp_path / "pairs.onnx").get_modelmeta()
    assert json.loads(facts.custom_metadata_map["thresholds"])[0] > 0
    assert "sigmoid gives the probability of each label" in facts.description


def test_check_counts_the_images_of_each_label(pairs: Path, command: Command) -> None:
    code, out, err = command("check", pairs, "--json")
    assert code == 0, err
    facts = json.loads(out)
    splits = load_splits(DataConfig(dataset=str(pairs)))
    assert list(facts["images"]["train"].values()) == splits.train.labels.sum(axis=0).tolist()
    code, out, _ = command("check", pairs)
    assert re.search(r"^images +640 +160 +120$", out, re.MULTILINE)


def test_fine_tuning_starts_from_a_model_of_several_labels(
    run: Path, pairs: Path, tmp_path: Path, command: Command
) -> None:
    words = ("--model", f"local-dir:{run / 'model'}", "--max-steps", 1, "--lr", 1e-6)
    words += ("--output-dir", tmp_path / "again")
    code, _, err = command("train", *FLAGS, "--dataset", pairs, *words)
    assert code == 0, err
    before, after = (RunRecord.load(folder / "record.json").evaluation for folder in (run, tmp_path / "again"))
    assert after.mean_average_precision == approx(before.mean_average_precision, abs=0.1)


def test_verify_reproduces_the_counts_of_every_label(run: Path, pairs: Path, command: Command) -> None:
    code, out, err = command("verify", run, "--dataset", pairs, "--threads", 1)
    assert code == 0, out + err
    for part in ("evaluation", "test"):
        assert re.search(rf"^{part}: counts of each class +\w+ +\w+ +ok$", out, re.MULTILINE)
    assert re.search(r"^table of classes in the card +10 rows +10 rows +ok$", out, re.MULTILINE)
