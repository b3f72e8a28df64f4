"""A published model is one commit, and loads in unmodified timm and transformers with equal weights."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pytest import fixture, mark
from support import warm_start
from support.client import Client
from support.loopback_hub import Fault, LoopbackHub, serve
from support.processes import TINY, run_interpreter, run_process

from resnext_hub.cards.model_card import render_card, wilson_interval
from resnext_hub.export.model_folder import export_model
from resnext_hub.facts import BaseModelFacts, UnreadableImage
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.lookup import build_model, find_model, portable_architecture
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

INPUT = dict(
    input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=0.9, crop_mode="center"
)


@fixture
def hub() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server


LOAD = """
import sys
import timm, torch
from safetensors.torch import load_file
source, expected, published, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums are the same bits only with the same number of threads
case, weights = load_file(expected), load_file(published)
model = timm.create_model(source, pretrained=True).eval()
assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "timm"
with torch.inference_mode():
    # timm copies the weights into tensors that are aligned as those of the exported model
    assert torch.equal(model(case["images"]), case["logits"]), "timm"
if source.startswith("local-dir:"):
    from transformers import AutoModelForImageClassification
    wrapped = AutoModelForImageClassification.from_pretrained(source.removeprefix("local-dir:")).eval()
    state_dict = wrapped.timm_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state_dict.items()), "transformers"
    with torch.inference_mode():
        # transformers maps the file, with 8-byte alignment, so kernels may sum in another order
        torch.testing.assert_close(wrapped(case["images"]).logits, case["logits"], rtol=1e-4, atol=1e-5)
    assert wrapped.config.id2label[0] == "first class", wrapped.config.id2label
assert "resnext_hub" not in sys.modules
"""


@mark.parametrize("name", ["resnext_g1", "resnext_g8", "resnext_g32", "resnext26_g32"])
def test_an_exported_variant_loads_with_equal_weights_in_stock_timm_and_transformers(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = find_model(name)
    torch.manual_seed(1)
    model = build_model(source, 3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.2, 0.5)
    architecture, model_args = portable_architecture(source)
    export_model(
        model,
        tmp_path / "model",
        architecture=architecture,
        model_args=model_args,
        input=InputConfig(**INPUT),
        label_names=["first class", "second", "third"],
        license="mit",
        plugin_facts={"variant": name},
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert set(config.get("model_args", {})) <= {"cardinality", "base_width"}
    assert "tag" not in config["pretrained_cfg"]
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = model.to(memory_format=torch.contiguous_format)(images)
    save_file({"images": images, "logits": logits}, tmp_path / "case.safetensors")
    done = warm_start.run(
        [
            sys.executable, "-c", LOAD, f"local-dir:{tmp_path / 'model'}", str(tmp_path / "case.safetensors"),
            str(tmp_path / "model" / "model.safetensors"), str(torch.get_num_threads()),
        ],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_push_uploads_the_folder_in_one_commit_that_timm_loads(
    finished: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    words = ("scripts/push.py", finished, "--repo-id", "me/digits", "--license", "mit")
    done = run_interpreter(*words, HF_HOME=str(tmp_path / "home"), **hub.environment())
    assert done.returncode == 0, done.stderr
    assert "published and verified: http" in done.stdout
    repo = hub.repos["models/me/digits"]
    assert len(repo.commits) == 2  # the initial commit of the Hub, and ours
    files = repo.commits[-1].files
    assert set(files) >= {"README.md", "config.json", "model.safetensors", "plots/curves.png"}
    assert files["model.safetensors"] == (finished / "model" / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"
    card = files["README.md"].decode()
    assert "license: mit" in card
    assert 'timm.create_model("hf-hub:me/digits", pretrained=True)' in card

    import timm

    model = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        save_file({"images": images, "logits": model(images)}, tmp_path / "case.safetensors")
    environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "other-home")}
    loaded = subprocess.run(
        [
            sys.executable, "-c", LOAD, "hf-hub:me/digits", str(tmp_path / "case.safetensors"),
            str(finished / "model" / "model.safetensors"), str(torch.get_num_threads()),
        ],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr


def test_a_push_removes_files_of_an_earlier_model_but_not_those_of_the_owner(
    finished: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    names = ("ood.safetensors", "plots/labels.png", "plots/reliability.png")
    earlier = {name: b"of another model" for name in names if not (finished / "model" / name).exists()}
    own = {"notes.txt": b"mine", "plots/mine.png": b"mine"}
    assert earlier
    repo = hub.create("models", "me/digits")
    repo.commit("an earlier model", repo.commits[-1].files | earlier | own)
    words = ("scripts/push.py", finished, "--repo-id", "me/digits", "--license", "mit")
    for published in ("published and verified", "already up to date"):
        done = run_process(*words, HF_HOME=str(tmp_path / "home"), **hub.environment())
        assert done.returncode == 0, done.stderr
        assert published in done.stdout
        assert not earlier.keys() & repo.commits[-1].files.keys()
        assert own.items() <= repo.commits[-1].files.items()
    assert len(repo.commits) == 3


def test_a_dry_run_lists_the_files_and_sends_no_request(finished: Path, hub: LoopbackHub) -> None:
    words = ("scripts/push.py", finished, "--repo-id", "me/digits", "--license", "mit", "--dry-run", "--private")
    done = run_process(*words, **hub.environment())
    assert done.returncode == 0, done.stderr
    assert "would upload to the private repository me/digits in one commit" in done.stdout
    assert "model.safetensors" in done.stdout
    assert hub.requests == []
    assert hub.repos == {}


def test_a_private_push_creates_a_private_repository(finished: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    words = ("scripts/push.py", finished, "--repo-id", "me/secret", "--license", "mit", "--private")
    done = run_process(*words, HF_HOME=str(tmp_path), **hub.environment())
    assert done.returncode == 0, done.stderr
    assert hub.repos["models/me/secret"].private


def test_a_push_needs_a_license_and_a_repository_id(finished: Path, command: Command) -> None:
    code, _, err = command("push", finished, "--repo-id", "me/digits")
    assert code == 2
    assert "--license is required" in err
    code, _, err = command("push", finished, "--repo-id", "me/digits/more", "--license", "mit")
    assert code == 2
    assert "--repo-id me/digits/more" in err


def test_a_push_with_an_unreachable_hub_keeps_the_model(finished: Path, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secretsecretsecret"}
    words = ("scripts/push.py", finished, "--repo-id", "me/digits", "--license", "mit")
    done = run_interpreter(*words, HF_HOME=str(tmp_path), **environment)
    assert done.returncode == 1
    assert "me/digits could not be published" in done.stderr
    assert f"The model is kept in {finished / 'model'}; rerun the same command to publish it" in done.stderr
    assert "hf_secret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_dataset_and_base_model_are_loaded_from_the_hub(
    finished: Path, folder_of_classes: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    import datasets

    from resnext_hub.data.config import DataConfig
    from resnext_hub.data.splits import load_splits

    splits = load_splits(DataConfig(dataset=str(folder_of_classes)))
    table = splits.train.rows.add_column("label", np_labels(splits.train.rows))
    table = table.cast_column("label", datasets.ClassLabel(names=["bus", "car", "train"]))
    table = table.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    repo = hub.create("datasets", "me/vehicles")
    repo.commit("data", {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()})
    files = {
        p.relative_to(finished / "model").as_posix(): p.read_bytes()
        for p in (finished / "model").rglob("*")
        if p.is_file()
    }
    hub.create("models", "me/base").commit("model", files)
    environment = hub.environment() | {"HF_HOME": str(tmp_path / "home")}

    words = (
        "scripts/train.py", "--dataset", "me/vehicles", "--model", "hf-hub:me/base", "--batch-size", 8,
        "--max-steps", 2, "--mixed-precision", "no", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    done = run_process(*words, **environment)
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert (record.dataset.hub_id, record.dataset.revision) == ("me/vehicles", repo.commits[-1].oid)
    assert record.label_names == ["bus", "car", "train"]
    assert record.dataset.train_count + record.dataset.eval_count == 30
    assert record.base_model is not None
    assert record.base_model.hub_id == "me/base"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "datasets:\n- me/vehicles" in card
    assert "base_model: me/base" in card

    missing = run_process("scripts/train.py", "--dataset", "me/none", **environment)
    assert missing.returncode == 2
    assert "me/none is neither a local folder nor a dataset on the Hub that you can access" in missing.stderr
    missing = run_process("scripts/train.py", "--model", "hf-hub:me/none", **environment)
    assert missing.returncode == 2
    assert "--model hf-hub:me/none: repository me/none does not exist" in missing.stderr

    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"a pickle"}
    hub.create("models", "me/pickled").commit("model", pickled)
    refused = run_process("scripts/train.py", "--model", "hf-hub:me/pickled", **environment)
    assert refused.returncode == 2
    assert "me/pickled has no model.safetensors (pickled weights are not loaded)" in refused.stderr


DIGITS_CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names: {'0': '0', '1': '1', '2': '2', '3': '3', '4': '4', '5': '5', '6': '6', '7': '7', '8': '8', '9': '9'}
  splits:
  - {name: train, num_bytes: 1, num_examples: 160}
  - {name: test, num_bytes: 1, num_examples: 40}
---
"""


@mark.parametrize("workers", [0, 2])
def test_a_dataset_is_streamed_from_the_hub_without_a_copy_on_disk(
    hub: LoopbackHub, tmp_path: Path, workers: int
) -> None:
    from resnext_hub.data.sources import load_digits_table

    table = load_digits_table()
    files = {"README.md": DIGITS_CARD.encode()}
    for name, part in (("train-0", range(90)), ("train-1", range(90, 160)), ("test-0", range(160, 200))):
        table.select(part).to_parquet(tmp_path / "part.parquet")
        files[f"data/{name}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    repo = hub.create("datasets", "me/digits")
    repo.commit("data", files)
    words = (
        "scripts/train.py", *TINY, "--dataset", "me/digits", "--streaming", "--image-size", 32, "--batch-size", 32,
        "--epochs", 2, "--lr", 0.01, "--log-samples", "--workers", workers, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    done = run_process(*words, **hub.environment() | {"HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    assert (
        "me/digits: 160 streamed training images, 40 streamed evaluation images (split test), 10 classes" in done.stderr
    )
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert (record.steps, record.epochs, record.dataset.revision) == (10, 2.0, repo.commits[-1].oid)
    assert [line["step"] for line in record.history if "eval_loss" in line] == [5, 10]
    assert record.evaluation.count == 40
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples-0.jsonl").read_text().splitlines()]
    seen = [index for line in lines for index in line["indices"]]
    assert Counter(seen) == Counter([*range(160)] * 2)
    assert not list((tmp_path / "home").rglob("*.arrow"))
    assert "The dataset was streamed" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_an_interrupted_stream_ends_the_run_which_resumes_later(hub: LoopbackHub, tmp_path: Path) -> None:
    from resnext_hub.data.sources import load_digits_table

    table, files = load_digits_table(), {"README.md": DIGITS_CARD.encode()}
    for name, part in (("train-0", range(60)), ("train-1", range(60, 160)), ("test-0", range(160, 200))):
        table.select(part).to_parquet(tmp_path / "part.parquet")
        files[f"data/{name}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    hub.create("datasets", "me/digits").commit("data", files)
    words = (
        "scripts/train.py", *TINY, "--dataset", "me/digits", "--streaming", "--image-size", 32, "--batch-size", 10,
        "--max-steps", 20, "--lr", 0.01, "--shuffle-block", 10, "--checkpoint-every", 1, "--log-samples", "--workers",
        1, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    environment = hub.environment() | {"HF_HOME": str(tmp_path / "home")}
    hub.faults.append(Fault("GET .*train-[01].parquet", "507", 1000))
    # both footers and some row groups can still be read
    hub.faults.insert(0, Fault("GET .*train-[01].parquet", "nothing", 9))
    done = run_process(*words, **environment)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "the stream was interrupted in shard" in done.stderr
    assert done.stderr.strip().endswith("rerun the same command to resume from the last checkpoint")
    hub.faults.clear()
    done = run_process(*words, **environment)
    assert done.returncode == 0, done.stderr
    assert "resuming from step-" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples-0.jsonl").read_text().splitlines()]
    assert set(Counter(index for line in lines for index in line["indices"]).values()) == {1, 2}
    assert len({index for line in lines for index in line["indices"]}) == 160


def test_image_files_of_a_repository_are_streamed(hub: LoopbackHub, tmp_path: Path, folder_of_classes: Path) -> None:
    files = {}
    for image in sorted(folder_of_classes.rglob("*.png")):
        for split in ("train", "test"):
            files[f"{split}/{image.relative_to(folder_of_classes).as_posix()}"] = image.read_bytes()
    files["train/bus/000.png"] = b"no image"
    hub.create("datasets", "me/files").commit("data", files)
    words = (
        "scripts/train.py", *TINY, "--dataset", "me/files", "--streaming", "--image-size", 32, "--batch-size", 10,
        "--max-steps", 4, "--lr", 0.01, "--log-samples", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    done = run_process(*words, **hub.environment() | {"HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.label_names == ["bus", "car", "train"]
    assert record.evaluation.count == 30
    assert record.unreadable_images == [
        UnreadableImage(split="training", image="bus/000.png (shard 0, record 8)", reason="not an image")
    ]


def np_labels(table) -> list[int]:
    names = ["bus", "car", "train"]
    return [names.index(Path(row["image"]["path"]).parent.name) for row in table]


def test_the_card_states_the_facts_of_the_record(finished: Path) -> None:
    record = RunRecord.load(finished / "record.json")
    card = render_card(record, "me/digits", "mit")
    assert f"({record.evaluation.correct}/360)**" in card
    assert f"{100 * record.evaluation.top1:.2f} %" in card
    assert record.model.weights_sha256 in card
    assert record.command in card
    for count in record.evaluation.measured:
        assert f"| {count} |" in card


def test_the_metadata_of_the_card_is_valid_for_the_hub(finished: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(render_card(RunRecord.load(finished / "record.json"), "me/digits", "mit"))
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "timm"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}.keys() == {
        "accuracy",
        "f1",
        "recall",
        "expected_calibration_error",
    }
    result = card.data.eval_results[0]
    assert (result.task_type, result.dataset_name, result.metric_type) == ("image-classification", "digits", "accuracy")
    assert result.metric_value == RunRecord.load(finished / "record.json").evaluation.top1


def test_every_snippet_of_the_card_runs_on_an_image(finished: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """Run the snippets of the published card against the Hub, and compare the output of the sample."""
    from resnext_hub.data.config import DataConfig
    from resnext_hub.data.splits import load_splits

    client = Client(hub, tmp_path / "home")
    assert client.command("push", finished, "--repo-id", "me/digits", "--license", "mit")[0] == 0
    card = hub.repos["models/me/digits"].commits[-1].files["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 4
    record = RunRecord.load(finished / "record.json")
    load_splits(DataConfig()).eval.image(record.sample.index).save(tmp_path / "image.png")
    code = (
        f"import os; os.chdir({str(tmp_path)!r})\n"
        + "\n".join(snippets)
        + """
shapes = [list(m.shape) for m in maps]
result = [label, classify("image.png")[0], shapes, list(embedding.shape), probabilities.tolist()]
"""
    )
    answer = client.run(code)
    client.close()
    assert answer["code"] == 0, answer["err"]
    label, classified, maps, embedding, probabilities = answer["result"]
    assert label == classified["label"] == record.sample.output[0][0]
    assert abs(classified["score"] - record.sample.output[0][1]) < 1e-3
    assert [shape[0] for shape in maps] == [1] * 5
    assert len(embedding) == 2
    best = record.label_names[int(np.argmax(probabilities))]
    assert (best, round(max(probabilities), 3)) == (label, round(record.sample.output[0][1], 3))
    output = ", ".join(f"{name} ({100 * value:.2f} %)" for name, value in record.sample.output)
    outcome = "correctly" if best == record.sample.label else "incorrectly"
    assert f"is classified {outcome}: {output}." in card


def test_the_card_states_known_weaknesses(finished: Path) -> None:
    record = RunRecord.load(finished / "record.json")
    confusion = record.evaluation.matrix
    np.fill_diagonal(confusion, 0)
    true, predicted = np.unravel_index(confusion.argmax(), confusion.shape)
    card = render_card(record)
    assert f"Most frequent confusions: {true} as {predicted} ({confusion.max()} times)" in card
    rare = dataclasses.replace(record, dataset=dataclasses.replace(record.dataset, train_counts=[3] + [140] * 9))
    assert "Classes with few training images: 0 (3)." in render_card(rare)


@mark.parametrize(
    ("base", "chosen", "warning"),
    [
        ("cc-by-nc-4.0", "mit", "is for non-commercial use only (cc-by-nc-4.0)"),
        ("cc-by-sa-4.0", "mit", "must be shared under the same license (cc-by-sa-4.0)"),
        ("cc-by-nd-4.0", "mit", "must not be shared in modified form"),
        ("gpl-3.0", "mit", "must be shared under the same license"),
        (None, "mit", "the license of the base model you/base is not stated"),
        ("apache-2.0", "mit", None),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", None),
    ],
)
def test_a_license_conflict_with_the_base_model_is_a_warning(
    finished: Path, base: str | None, chosen: str, warning: str | None
) -> None:
    record = RunRecord.load(finished / "record.json")
    tuned = dataclasses.replace(record, base_model=BaseModelFacts(id="you/base", hub_id="you/base", license=base))
    card = render_card(tuned, "me/digits", chosen)
    assert f"(license: {base or 'not stated'})" in card
    assert ("Check the license" in card) == (warning is not None)
    assert warning is None or warning in card


def test_the_confidence_interval_is_the_wilson_score() -> None:
    low, high = wilson_interval(9, 10)  # 0.5958 and 0.9821 in published tables
    assert (round(low, 4), round(high, 4)) == (0.5958, 0.9821)
    assert wilson_interval(10, 10)[1] <= 1.0
