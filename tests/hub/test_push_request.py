"""Exactly the model of the record is published; everything else is rejected before a request is sent."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from pytest import MonkeyPatch, fixture, mark, raises
from safetensors.torch import save_file
from support.processes import run_process
from support.records import a_record, replace_by

from resnext_hub.cards.licenses import LICENSES, check_license
from resnext_hub.cards.model_card import render_card
from resnext_hub.errors import RequestError
from resnext_hub.files import sha256_of
from resnext_hub.hub.checkpoints import fetched_settings
from resnext_hub.hub.publish import check_request

Command = Callable[..., tuple[int, str, str]]


CFG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}


@fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder with a model of one tensor."""
    model = tmp_path / "model"
    (model / "plots").mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, model / "model.safetensors")
    record = a_record()
    facts = {**vars(record.model), "weights_sha256": sha256_of(model / "model.safetensors")}
    record = a_record(model=type(record.model)(**facts))
    config = {"architecture": "test_resnet", "num_classes": 3, "label_names": record.label_names, "pretrained_cfg": CFG}
    (model / "config.json").write_text(json.dumps(config))
    (model / "README.md").write_text(render_card(record))
    (model / "plots" / "curves.png").write_bytes(b"png")
    record.save(tmp_path / "record.json")
    return tmp_path


def dry_run(command: Command, run: Path, *more: str) -> tuple[int, str, str]:
    return command("push", run, "--repo-id", "me/x", "--license", "mit", "--dry-run", *more)


def names(listing: str) -> set[str]:
    return {line.split()[-1] for line in listing.splitlines()[1:]}


def test_only_files_of_the_model_are_uploaded(run: Path, command: Command) -> None:
    for name in ("pytorch_model.bin", ".secret", "model.onnx", "plots/samples.png", "modeling.py", "x.png"):
        (run / "model" / name).write_text("planted")
    (run / "model" / "plots" / "confusion_matrix.png").symlink_to("/etc/passwd")
    (run / "model" / "folder").symlink_to("/etc")
    code, out, err = dry_run(command, run)
    assert code == 0, err
    assert names(out) == {"README.md", "config.json", "model.safetensors", "plots/curves.png"}
    assert "ignoring files that are not part of the model: .secret, folder" in err


def test_linked_plots_are_not_uploaded(run: Path, command: Command) -> None:
    (run / "model" / "plots").rename(run / "elsewhere")
    (run / "model" / "plots").symlink_to(run / "elsewhere")
    code, out, err = dry_run(command, run)
    assert code == 0, err
    assert names(out) == {"README.md", "config.json", "model.safetensors"}


def test_a_card_omits_a_missing_plot(run: Path, command: Command) -> None:
    code, _, err = dry_run(command, run)
    assert code == 0
    assert "some are missing from the model folder (confusion_matrix.png)" in err
    assert "curves.png" not in err


def test_a_card_is_written_in_utf_8_in_any_locale(run: Path) -> None:
    card = run / "model" / "README.md"
    card.write_text(f"{card.read_text('utf-8')}\nUn mot à moi: 猫.\n", "utf-8")
    words = ("-m", "resnext_hub", "push", run, "--repo-id", "me/x", "--license", "mit", "--dry-run")
    done = run_process(*words, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr


def test_the_model_folder_may_be_a_link(run: Path, command: Command) -> None:
    (run / "model").rename(run / "elsewhere")
    (run / "model").symlink_to("elsewhere")
    assert dry_run(command, run)[0] == 0


@mark.parametrize("name", ["model.safetensors", "config.json"])
@mark.parametrize("kind", ["FIFO", "folder", "device", "dangling link", "other bytes"])
def test_a_model_that_differs_from_the_record_is_rejected(run: Path, command: Command, name: str, kind: str) -> None:
    path = run / "model" / name
    if kind == "other bytes":
        path.write_bytes(path.read_bytes() + b" x")
    else:
        replace_by(path, kind)
    code, out, err = dry_run(command, run)
    assert (code, out) == (2, "")
    assert f"{path}" in err
    assert err.count("\n") == 1
    assert "rerun the training command to write the model folder again" in err


@mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "resnet18"),
        ("label_names", ["a", "b", "c"]),
        ("num_classes", "3"),
        ("model_args", {"cardinality": 7}),
        ("auto_map", {"AutoModel": "you/evil--code.Model"}),
        ("pretrained_cfg", []),
        ("pretrained_cfg", CFG | {"url": "http://example.com/weights.pth"}),
        ("pretrained_cfg", CFG | {"hf_hub_id": "you/model"}),
        ("pretrained_cfg", CFG | {"input_size": [3, 64, 64]}),
        ("pretrained_cfg", {}),
    ],
)
def test_a_config_that_differs_from_the_record_is_rejected(
    run: Path, command: Command, key: str, value: object
) -> None:
    path = run / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, _, err = dry_run(command, run)
    assert code == 2
    assert key in err


@mark.parametrize("content", [b"\xff", b"---\n[\n---\n", b"# An own card\n"])
def test_a_foreign_local_card_is_replaced_only_with_overwrite_card(run: Path, command: Command, content: bytes) -> None:
    (run / "model" / "README.md").write_bytes(content)
    code, _, err = dry_run(command, run)
    assert code == 2
    assert "--overwrite-card" in err
    assert dry_run(command, run, "--overwrite-card")[0] == 0
    assert (run / "model" / "README.md").read_bytes() == content


@mark.parametrize("revision", ["", "../x", "a b", "refs/"])
def test_an_invalid_revision_is_rejected_without_a_request(run: Path, command: Command, revision: str) -> None:
    code, _, err = dry_run(command, run, "--revision", revision)
    assert code == 2
    assert "is not a valid revision: expected a branch" in err


def test_a_missing_card_is_regenerated(run: Path, command: Command) -> None:
    (run / "model" / "README.md").unlink()
    code, out, _ = dry_run(command, run)
    assert code == 0
    assert "README.md" in out


@mark.parametrize(
    ("asked", "close"),
    [("apache", "apache-2.0"), ("Apache-2.0", "apache-2.0"), ("MIT", "mit"), ("cc-by", "cc-by-4.0"), ("gpl3", "gpl")],
)
def test_an_unknown_license_is_reported_with_close_ids(asked: str, close: str) -> None:
    with raises(RequestError, match=f"license={asked}: expected an ID from the Hub's list, such as .*{close}"):
        check_license(asked)


def test_exactly_the_licenses_of_the_hub_are_accepted() -> None:
    for license in LICENSES:
        assert check_request(None, "me/x", license) == ("me/x", license)
    for license in ("", " mit", "mit\n", "\x1b[31m", "hf_secretsecretsecret", "x" * 5000):
        with raises(RequestError) as caught:
            check_request(None, "me/x", license)
        assert "secret" not in str(caught.value)
        assert len(str(caught.value)) < 300


@mark.parametrize("repo_id", ["hf_secretsecretsecret", "me/hf_secretsecretsecret/x", "hf_secretsecretsecret/a/b"])
def test_a_token_passed_as_repository_is_never_shown(run: Path, command: Command, repo_id: str) -> None:
    code, out, err = command("push", run, "--repo-id", repo_id, "--license", "mit")
    assert code == 2
    assert "secret" not in out + err
    assert "expected owner/name" in err


FETCHED = {"dataset": "digits", "model": "test_resnet", "lr": 0.1, "push_to_hub": False, "private": False}


def test_a_fetched_run_passes_on_no_publishing_or_machine_settings() -> None:
    machine = {"push_to_hub": True, "repo_id": "me/x", "license": "mit", "private": True, "workers": 9}
    settings = fetched_settings(FETCHED | machine | {"threads": "1"}, {}, "hub:you/run")
    # threads is inherited, since the last bits depend on it
    assert settings == {"dataset": "digits", "model": "test_resnet", "lr": 0.1, "threads": "1"}


@mark.parametrize("dataset", ["pets", "/home/you/pets", "../pets", "C:\\pets", ""])
def test_the_local_dataset_of_a_fetched_run_must_be_given(dataset: str) -> None:
    with raises(RequestError, match="pass its path as dataset"):
        fetched_settings(FETCHED | {"dataset": dataset}, {}, "hub:you/run")
    assert fetched_settings(FETCHED | {"dataset": dataset}, {"dataset"}, "hub:you/run")["lr"] == 0.1


def test_a_hub_dataset_with_the_name_of_a_local_folder_must_be_given(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fetched = FETCHED | {"dataset": "you/pets"}
    assert fetched_settings(fetched, {}, "hub:you/run")["dataset"] == "you/pets"
    os.makedirs("you/pets")
    with raises(RequestError, match="pass its path as dataset"):
        fetched_settings(fetched, {}, "hub:you/run")
    with raises(RequestError, match="pass its path as model"):
        fetched_settings(FETCHED | {"model": "local-dir:a/model"}, {}, "hub:you/run")
