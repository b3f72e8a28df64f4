"""`verify` reproduces an honest card, and names what differs from a card that is not."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from pytest import fixture, mark, raises
from support.client import Client
from support.loopback_hub import LoopbackHub, serve
from support.processes import TINY

from resnext_hub.cards.eval_results import eval_results
from resnext_hub.cards.model_card import render_card
from resnext_hub.cards.statements import config_facts, read_statements
from resnext_hub.data.sources import load_digits_table
from resnext_hub.errors import RequestError, RunError
from resnext_hub.export.model_folder import export_model
from resnext_hub.facts import EvaluationFacts
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.lookup import build_model, find_model, portable_architecture
from resnext_hub.record import RunRecord, sparse_rows
from resnext_hub.runs.recount import start_timm

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def running(tmp_path_factory) -> Iterator[tuple[LoopbackHub, Client]]:
    with serve() as hub:
        client = Client(hub, tmp_path_factory.mktemp("home"))
        yield hub, client
        client.close()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def flip_a_byte(folder: Path, name: str = "model.safetensors") -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


def swap_names(folder: Path) -> None:
    def swap(config: dict[str, Any]) -> None:
        names = config["label_names"]
        names[3], names[7] = names[7], names[3]

    edit_config(folder, swap)


def change_the_mean(folder: Path) -> None:
    edit_config(folder, lambda config: config["pretrained_cfg"].update(mean=[0.9, 0.9, 0.9]))


def change_a_count(folder: Path) -> None:
    card = folder / "README.md"
    text = card.read_text()
    row = re.search(r"^\| 4 \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert row is not None
    better = f"| 4 | {row[1]} | {int(row[2]) + 1} |"
    card.write_text(text.replace(row[0], better))


DAMAGES = {
    "flipped byte": (flip_a_byte, "model.safetensors"),
    "flipped byte of the score": (partial(flip_a_byte, name="ood.safetensors"), "ood.safetensors"),
    "swapped names": (swap_names, "config.json: label_names"),
    "changed mean": (change_the_mean, "config.json: pretrained_cfg.mean"),
    "changed count": (change_a_count, "card"),
}
"""What is done to a model folder, and what `verify` names."""


@fixture
def model(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "model", tmp_path / "model"))


def put(hub: LoopbackHub, repo_id: str, folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.create("models", repo_id).commit("model", files)


def differing(out: str) -> list[str]:
    """What a table of checks says that differs."""
    rows = [re.split(r"  +", line) for line in out.splitlines()[1:]]
    assert all(row[-1] in ("ok", "differs") for row in rows), out
    return [row[0] for row in rows if row[-1] == "differs"]


def test_a_published_model_is_reproduced_by_timm_alone(finished: Path, running: tuple[LoopbackHub, Client]) -> None:
    _, client = running
    assert client.command("push", finished, "--repo-id", "me/digits", "--license", "mit")[0] == 0
    code, out, err = client.command("verify", "me/digits", "--threads", 1)
    assert (code, differing(out)) == (0, []), err
    assert "with timm" in err
    assert "alone" in err
    record = RunRecord.load(finished / "record.json")
    expected = f"{record.evaluation.correct}/{record.evaluation.count}"
    assert re.search(rf"^evaluation: correct +{expected} +{expected} +ok$", out, re.MULTILINE)


def test_the_hashes_are_those_that_the_client_of_the_hub_verifies(
    model: Path, running: tuple[LoopbackHub, Client]
) -> None:
    hub, client = running
    put(hub, "me/hashed", model)
    code, out, err = client.command("verify", "hf-hub:me/hashed@main", "--no-evaluate")
    assert code == 0, err
    answer = client.run(
        "from huggingface_hub import HfApi\nfound = HfApi().verify_repo_checksums('me/hashed')\n"
        "result = [found.revision, found.checked_count, found.mismatches, found.missing_paths, found.extra_paths]"
    )
    revision, count, *others = answer["result"]
    assert others == [[], [], []]
    assert re.search(rf"^commit {revision[:12]} +{count} files +{count} files +ok$", out, re.MULTILINE)


@mark.parametrize("damage", DAMAGES)
@mark.parametrize("place", ["folder", "hub"])
def test_what_differs_from_the_card_is_named(
    model: Path, running: tuple[LoopbackHub, Client], damage: str, place: str
) -> None:
    hub, client = running
    change, what = DAMAGES[damage]
    change(model)
    where: object = model
    if place == "hub":
        where = f"me/{damage.replace(' ', '-')}"
        put(hub, str(where), model)
    code, out, err = client.command("verify", where, "--no-evaluate")
    assert (code, differing(out)) == (1, [what]), err
    assert err.strip().splitlines()[-1] == f"error: {where} differs from its card: {what}"
    if damage == "swapped names":
        assert re.search(r"label_names +3, 7 +7, 3 +differs", out)


def better(facts: EvaluationFacts) -> EvaluationFacts:
    """The results with one more correct prediction."""
    matrix = facts.matrix
    label, wrong = next((a, b) for a, b in np.argwhere(matrix).tolist() if a != b)
    matrix[label, wrong] -= 1
    matrix[label, label] += 1
    correct = facts.correct + 1
    return dataclasses.replace(
        facts, confusion=sparse_rows(matrix.tolist()), correct=correct, top1=correct / facts.count
    )


@mark.parametrize("damage", ["swapped names", "changed mean", "changed count"])
def test_a_card_that_was_written_for_the_damage_is_contradicted_by_the_evaluation(
    finished: Path, model: Path, command: Command, damage: str
) -> None:
    record = RunRecord.load(finished / "record.json")
    if damage == "changed count":
        record = dataclasses.replace(record, evaluation=better(record.evaluation))
    else:
        DAMAGES[damage][0](model)
    config = json.loads((model / "config.json").read_text())
    (model / "README.md").write_text(render_card(record, config=config))
    code, out, err = command("verify", model, "--threads", 1)
    assert code == 1, err
    expected = ["evaluation: correct", "evaluation: counts of each class", "table of classes in the card"]
    assert differing(out) == expected


def test_a_figure_that_contradicts_another_of_the_card_is_found_without_an_evaluation(
    finished: Path, model: Path, command: Command
) -> None:
    record = RunRecord.load(finished / "record.json")
    config = json.loads((model / "config.json").read_text())
    honest = render_card(record, config=config)
    figure = f"({record.evaluation.correct}/{record.evaluation.count})"
    for wrong in (
        honest.replace(figure, figure.replace("(", "(1")),
        honest.replace(f"value: {record.evaluation.top1!r}", "value: 0.999"),
        honest.replace(f"| {record.evaluation.count} | {record.evaluation.correct} |", "| 360 | 359 |"),
    ):
        assert wrong != honest
        (model / "README.md").write_text(wrong)
        code, out, _ = command("verify", model, "--no-evaluate")
        assert (code, differing(out)) == (1, ["card", "results in the card"])


def test_a_damaged_copy_in_the_cache_is_named_and_downloaded_again(
    model: Path, running: tuple[LoopbackHub, Client]
) -> None:
    hub, client = running
    put(hub, "me/cached", model)
    assert client.command("verify", "me/cached", "--no-evaluate")[0] == 0
    code = "from huggingface_hub import hf_hub_download\nresult = hf_hub_download('me/cached', 'config.json')"
    answer = client.run(code)
    config = Path(answer["result"])
    damaged = config.read_bytes().replace(b"0.5", b"0.4", 1)
    config.resolve().write_bytes(damaged)
    code, _, err = client.command("verify", "me/cached", "--no-evaluate")
    assert code == 1
    assert "config.json of me/cached does not match its hash on the Hub; it was removed from the cache" in err
    assert client.command("verify", "me/cached", "--no-evaluate")[0] == 0


def test_a_file_name_that_leads_out_of_the_repository_is_refused(
    model: Path, running: tuple[LoopbackHub, Client]
) -> None:
    hub, client = running
    put(hub, "me/hostile", model)
    hub.repos["models/me/hostile"].commits[-1].files["../../outside"] = b"outside"
    code, out, err = client.command("verify", "me/hostile", "--no-evaluate")
    assert (code, out) == (2, "")
    assert "lists the file ../../outside, which is not in the repository" in err


def test_a_local_dataset_is_named_by_the_user_and_has_to_be_the_same(vehicles_run: Path, command: Command) -> None:
    code, out, err = command("verify", vehicles_run)
    assert code == 2
    assert "the card describes the local dataset vehicles; pass its path with --dataset PATH" in err
    code, out, err = command("verify", vehicles_run, "--dataset", vehicles_run.parent / "vehicles", "--threads", 1)
    assert (code, differing(out)) == (0, []), err
    assert "evaluation: correct" in out
    other = vehicles_run.parent / "vehicles" / "train"
    code, out, err = command("verify", vehicles_run / "model", "--dataset", other)
    assert code in (1, 2)
    assert "evaluation: correct" not in out


@mark.slow
@mark.parametrize("streaming", [(), ("--streaming",)], ids=["whole", "streamed"])
def test_a_dataset_on_the_hub_is_evaluated_at_the_revision_of_the_run_and_its_result_is_in_eval_results(
    running: tuple[LoopbackHub, Client], tmp_path: Path, streaming: tuple[str, ...]
) -> None:
    from huggingface_hub import parse_eval_result_entries

    hub, client = running
    table, files = load_digits_table(), {}
    for split, rows in (("train", range(120)), ("test", range(120, 180))):
        table.select(rows).to_parquet(tmp_path / "part.parquet")
        files[f"data/{split}-0.parquet"] = (tmp_path / "part.parquet").read_bytes()
    dataset = hub.create("datasets", "me/numbers")
    revision = dataset.commit("data", files).oid
    flags = ("--dataset", "me/numbers", "--image-size", 32, "--batch-size", 32, "--max-steps", 3, *streaming)
    run = tmp_path / "run"
    code, _, err = client.command("train", *TINY, *flags, "--output-dir", run)
    assert code == 0, err
    assert client.command("push", run, "--repo-id", "me/reader", "--license", "mit")[0] == 0
    dataset.commit("fewer images", dict.fromkeys(files, files["data/test-0.parquet"]))
    code, out, err = client.command("verify", "hf-hub:me/reader", "--threads", 1)
    assert (code, differing(out)) == (0, []), err

    published = hub.repos["models/me/reader"].commits[-1].files
    name = ".eval_results/me_numbers.yaml"
    assert published[name] == (run / "model" / name).read_bytes()
    (entry,) = parse_eval_result_entries(yaml.safe_load(published[name]))
    record = RunRecord.load(run / "record.json")
    assert (entry.dataset_id, entry.dataset_revision, entry.task_id) == ("me/numbers", revision, "default")
    assert entry.value == record.reported.top1
    assert entry.notes == f"top-1 accuracy, {record.reported.correct}/60 on the test split"

    # what a run held out for itself is no result of the benchmark
    held_out = dataclasses.replace(record.dataset, eval_split=None, test_split=None)
    assert eval_results(dataclasses.replace(record, dataset=held_out)) == {}
    local = dataclasses.replace(record.dataset, hub_id=None)
    assert eval_results(dataclasses.replace(record, dataset=local)) == {}


@mark.parametrize(("name", "plugin"), [("resnext29_g8_w64", True), ("resnext26_g32", False)])
def test_the_package_is_imported_only_for_a_variant_that_timm_lacks(name: str, plugin: bool, tmp_path: Path) -> None:
    import timm

    source = find_model(name)
    net = build_model(source, 3)
    architecture, model_args = portable_architecture(source)
    size = InputConfig(
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
    )
    export_model(
        net, tmp_path / "model", architecture=architecture, model_args=model_args, input=size,
        label_names=["a", "b", "c"], license="mit", plugin_facts={},
    )  # fmt: skip
    saved = find_model(f"local-dir:{tmp_path / 'model'}")
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    with start_timm(tmp_path / "model", saved, 2, "cpu") as process:
        assert process.versions == {"timm": timm.__version__, "plugin": plugin}
        found = process.logits([image])
    transform = timm.data.create_transform(**size.to_timm(), is_training=False)
    with torch.inference_mode():
        expected = net.eval()(transform(image)[None])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_an_evaluation_that_fails_is_one_line(model: Path) -> None:
    saved = find_model(f"local-dir:{model}")
    (model / "model.safetensors").write_bytes(b"gone")
    with raises(RunError, match="timm could not compute the logits: "), start_timm(model, saved, 2, "cpu"):
        pass


def test_a_card_without_statements_or_none_is_refused(finished: Path, model: Path, command: Command) -> None:
    (model / "README.md").write_text(render_card(RunRecord.load(finished / "record.json")))
    code, _, err = command("verify", model)
    assert code == 2
    assert "contains nothing that can be checked" in err
    (model / "README.md").write_text("---\nresnext_hub: {format_version: 1}\n---\n")
    with raises(RequestError, match=r"README\.md is damaged"):
        read_statements(model / "README.md")
    (model / "README.md").write_text("---\nresnext_hub: {format_version: 9}\n---\n")
    with raises(RequestError, match="format version 9, but this version of resnext-hub reads version 1"):
        read_statements(model / "README.md")
    (model / "README.md").unlink()
    code, _, err = command("verify", model)
    assert code == 2
    assert "README.md cannot be read: No such file or directory" in err
    code, _, err = command("verify", "nothing-here")
    assert code == 2
    assert "nothing-here: expected hf-hub:owner/name, or a folder" in err


def test_the_values_of_a_config_are_stated_unless_they_are_long_or_contain_names() -> None:
    cfg = {"mean": [0.5], "long": list(range(99))}
    facts = config_facts({"architecture": "resnext50_32x4d", "label_names": ["a"], "cfg": cfg})
    assert (facts["architecture"], facts["cfg.mean"]) == ("resnext50_32x4d", [0.5])
    assert re.fullmatch("sha256:[0-9a-f]{64}", facts["label_names"])
    assert re.fullmatch("sha256:[0-9a-f]{64}", facts["cfg.long"])
