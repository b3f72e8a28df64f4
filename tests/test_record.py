"""A record and a run's settings are read as they were written, or refused in one line that names the file."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pytest import fixture, mark, raises
from support.records import DAMAGES, NO_FILES, a_record, replace_by

from resnext_hub.errors import RequestError
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.existing import read_config
from resnext_hub.training.config import TrainConfig

Command = Callable[..., tuple[int, str, str]]


@fixture
def folder(tmp_path: Path) -> Path:
    """A run folder without weights."""
    a_record().save(tmp_path / "record.json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TrainConfig().to_flat(), sort_keys=False))
    return tmp_path


def test_a_record_comes_back_as_it_was_saved(folder: Path) -> None:
    assert RunRecord.load(folder / "record.json") == a_record()


def refusal(read: Callable[[], object], name: str) -> str:
    with raises(RequestError) as caught:
        read()
    said = str(caught.value)
    assert name in said
    assert "\n" not in said
    assert len(said) < 700
    return said


@mark.parametrize("damage", [*DAMAGES, *NO_FILES])
def test_a_damaged_record_is_refused_with_its_name_and_the_way_out(folder: Path, damage: str) -> None:
    path = folder / "record.json"
    if damage in NO_FILES:
        replace_by(path, damage)
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    said = refusal(lambda: RunRecord.load(path), str(path))
    assert said.endswith("remove the file, and rerun the training command to write it again")


def changed(content: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    *parts, last = where.split(".")
    inner = content
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return content


@mark.parametrize(
    ("where", "value"),
    [
        ("format_version", 99),
        ("format_version", None),
        ("format_version", True),
        ("format_version", "2"),
        ("sparkle", 1),
        ("evaluation.sparkle", 1),
        ("evaluation.top1", "high"),
        ("evaluation.top1", 0.5),
        ("evaluation.correct", 12),
        ("evaluation.count", 0),
        ("evaluation.confusion", [[[0, 11]]]),
        ("evaluation.confusion", [[[0, 3], [9, 1]], [[1, 4]], [[2, 4]]]),
        ("label_names", ["bus", "car"]),
        ("label_names", {"0": "bus"}),
        ("label_names", [1, 2, 3]),
        ("dataset.train_counts", [1]),
        ("model", []),
        ("model.input", {}),
        ("model.weights_sha256", "abc"),
        ("hardware", {"device": "cpu"}),
        ("hardware.mixed_precision", "int4"),
        ("changed", ["lr", "sparkle"]),
        ("config", {}),
        ("sample.output", []),
        ("sample.output", [["bus"]]),
        ("base_model", 3),
        ("history", [1]),
        ("steps", -0.5),
        ("steps", -5),
        ("epochs", -1.0),
        ("wall_seconds", -9.0),
        ("processes", 0),
        ("evaluation.step", 10**9),
        ("evaluation.macro_f1", 2.0),
        ("evaluation.calibration_error", -0.1),
        ("evaluation.top5", 7.0),
        ("evaluation.batch_size", 0),
        ("evaluation.confusion", [[[0, 3], [1, 3], [2, -2]], [[1, 4]], [[2, 4]]]),
        ("evaluation.confusion", [[[0, 1], [0, 2], [1, 1]], [[1, 4]], [[2, 4]]]),
        ("dataset.eval_count", 5),
        ("dataset.train_count", -3),
        ("dataset.train_counts", [-1, 0, 1]),
        ("model.parameters", -1),
        ("model.input", {"input_size": [3, 0, 0]}),
        ("sample.index", -1),
        ("sample.label", "ship"),
        ("sample.output", [["ship", 0.5]]),
        ("sample.output", [["bus", 7.5]]),
        ("unreadable_images", [{}]),
        ("plots", ["../../secret.png"]),
        ("merged_groups", {"conv1": 0}),
    ],
)
def test_a_record_of_another_shape_is_refused(folder: Path, where: str, value: Any) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), where, value)))
    refusal(lambda: RunRecord.load(path), str(path))


def test_a_record_with_nan_is_refused(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": NaN'))
    refusal(lambda: RunRecord.load(path), str(path))


def test_a_record_of_format_1_is_read(folder: Path) -> None:
    path = folder / "record.json"
    content = json.loads(path.read_text())
    content = changed(content, "evaluation.confusion", [[3, 1, 0], [0, 4, 0], [0, 0, 4]])
    path.write_text(json.dumps(changed(content, "format_version", 1)))
    assert RunRecord.load(path) == a_record()
    path.write_text(json.dumps(changed(content, "evaluation.confusion", [[3, 1], [0, 4, 0], [0, 0, 4]])))
    refusal(lambda: RunRecord.load(path), str(path))


def test_a_record_grows_with_classes_and_not_with_classes_squared(tmp_path: Path) -> None:
    sizes = []
    for classes in (500, 1000):
        rows = [[(n, 2), ((n + 1) % classes, 1)] for n in range(classes)]
        a_record([f"class {n}" for n in range(classes)], rows).save(tmp_path / "record.json")
        sizes.append((tmp_path / "record.json").stat().st_size)
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[1] < 400_000


def test_a_record_of_10_000_classes_has_less_than_5_megabytes(tmp_path: Path) -> None:
    rows = [[((n + other) % 10_000, 1 + other % 2) for other in range(0, 200, 20)] for n in range(10_000)]
    a_record([f"the name of class {n}" for n in range(10_000)], rows).save(tmp_path / "record.json")
    assert (tmp_path / "record.json").stat().st_size < 5e6 / 2  # as much remains for the results on a test split
    lines = (tmp_path / "record.json").read_text().splitlines()
    assert "      [[0,1],[20,1],[40,1],[60,1],[80,1],[100,1],[120,1],[140,1],[160,1],[180,1]]," in lines
    assert len(lines) < 3 * 10_000  # lines of names and of rows


def test_a_record_with_a_line_for_each_number_is_read(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2))
    assert RunRecord.load(path) == a_record()


@mark.parametrize("damage", [*DAMAGES, *NO_FILES])
def test_damaged_settings_are_refused_with_the_name_of_their_file(folder: Path, damage: str) -> None:
    path = folder / "config.yaml"
    if damage in NO_FILES:
        replace_by(path, damage)
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    said = refusal(lambda: read_config(RunFolder(folder)), str(path))
    assert said.endswith("restore the file, or choose another output_dir")


def test_settings_cut_off_anywhere_are_refused(folder: Path) -> None:
    path = folder / "config.yaml"
    content = path.read_text()
    lines = content.splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_text("".join(lines[:count]))
        refusal(lambda: read_config(RunFolder(folder)), str(path))
    for count in range(len(content) - 15, len(content) - 1):
        path.write_text(content[:count])
        refusal(lambda: read_config(RunFolder(folder)), str(path))


@mark.parametrize(
    "content",
    [
        "lr: !!python/object/apply:os.system ['touch x']",
        "lr: !!python/name:os.system",
        "!!python/object:resnext_hub.training.config.TrainConfig {}",
        "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nmean: [*b, *b, *b]",
        "mean: &m [*m]",
        "mean: [0.5, 0.5",
        "{" * 200_000,
        "- " * 200_000,
        "lr: 0.1\nlr: 0.2",
        "lr: .nan",
        "lr: fast",
        "lr: [0.1]",
        "lr: {value: 0.1}",
        "epochs: 1e999",
        "seed: " + "9" * 5000,
        "dataset_revision: [main]",
        "1: 2",
        "? [lr]\n: 1",
        "sparkle: 1",
        "lr: 0.1\n--- \nlr: 0.2",
        "lr: !!binary aGk=",
        "<<: {lr: 0.1}",
    ],
    ids=lambda content: content[:24],
)
def test_settings_of_another_shape_are_refused(folder: Path, content: str) -> None:
    (folder / "config.yaml").write_text(content)
    refusal(lambda: read_config(RunFolder(folder)), "config.yaml")
    assert not (folder / "x").exists()


def test_numbers_are_read_as_people_write_them(folder: Path) -> None:
    (folder / "config.yaml").write_text("lr: 1e-3\nweight_decay: 5E-2\ndataset: '2020'\nprivate: false\n")
    read = read_config(RunFolder(folder))
    assert {"lr": 0.001, "weight_decay": 0.05, "dataset": "2020", "private": False}.items() <= read.items()


@mark.parametrize("name", ["record.json", "config.yaml"])
@mark.parametrize("words", [("evaluate",), ("push",), ("train", "--output-dir")], ids=lambda words: words[0])
def test_every_command_refuses_a_damaged_run_in_one_line(
    folder: Path, name: str, words: tuple[str, ...], command: Command
) -> None:
    (folder / name).write_text("[")
    if words == ("push",) and name == "config.yaml":
        return  # which reads the record alone
    more = ("--repo-id", "me/x", "--license", "mit", "--dry-run") if words == ("push",) else ()
    code, out, err = command(*words, folder, *more)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"{folder / name}" in err


def test_contradictions_are_found_when_a_record_is_made_too() -> None:
    record = a_record()
    with raises(ValueError, match="results for every class"):
        dataclasses.replace(record, label_names=["bus"])
