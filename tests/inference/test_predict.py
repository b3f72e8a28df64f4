"""The command predict prints the classes of images, the same as the run's own evaluation."""

import contextlib
import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from pyarrow import parquet
from pytest import MonkeyPatch, approx, fixture, mark, raises
from support.loopback_hub import serve
from support.processes import ROOT, run_process, small_model, write_images

import resnext_hub
from resnext_hub.errors import RequestError, RunError
from resnext_hub.inference.classifier import load
from resnext_hub.inference.inputs import find_images
from resnext_hub.inference.prediction import predict

Command = Callable[..., tuple[int, str, str]]

CLASSES = ["bus", "car", "train"]


@fixture
def command(command: Command) -> Command:
    """Run a command on one thread, like the run; small models are fastest that way on a busy machine."""
    return lambda *arguments: command(*arguments, "--threads", 1)


@fixture
def images(vehicles_run: Path) -> Path:
    return vehicles_run.parent / "vehicles" / "validation"


def evaluated(run: Path) -> dict[str, list]:
    return parquet.read_table(run / "predictions.parquet").to_pydict()


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_predictions_equal_the_runs_evaluation_bit_for_bit(vehicles_run: Path, images: Path, command: Command) -> None:
    code, out, err = command("predict", vehicles_run, images, "--json")
    assert code == 1  # because of the unreadable one
    lines = objects(out)
    found = [line for line in lines if "error" not in line]
    unreadable = {"path": str(images / "car" / "005-broken.png"), "error": "not an image"}
    assert [line for line in lines if line not in found] == [unreadable]
    expected = evaluated(vehicles_run)
    files = sorted(images.rglob("*.png"))
    assert [line["path"] for line in found] == [str(files[index]) for index in expected["index"]]
    best = [line["predictions"][0] for line in found]
    assert len(best) == 36
    assert [guess["index"] for guess in best] == expected["prediction"]
    assert [guess["label"] for guess in best] == [CLASSES[index] for index in expected["prediction"]]
    assert np.float32([guess["probability"] for guess in best]).tolist() == expected["probability"]
    assert len(set(expected["prediction"])) > 1  # otherwise equal predictions would prove little
    assert err.splitlines() == [
        f"{images / 'car' / '005-broken.png'}: cannot be decoded: not an image",
        "error: 1 of 37 images could not be decoded",
    ]


@mark.parametrize("batch_size", [1, 7])
def test_another_batch_size_gives_the_same_labels(
    batch_size: int, vehicles_run: Path, images: Path, command: Command
) -> None:
    _, out, _ = command("predict", vehicles_run, images, "--json", "--batch-size", batch_size)
    expected = evaluated(vehicles_run)
    best = [line["predictions"][0] for line in objects(out) if "predictions" in line]
    assert [guess["index"] for guess in best] == expected["prediction"]
    # other shapes are other sums in float32
    assert [guess["probability"] for guess in best] == approx(expected["probability"], rel=1e-5)


def test_a_line_holds_path_label_and_probability_between_tabs(
    vehicles_run: Path, images: Path, command: Command
) -> None:
    first, second = images / "train" / "003.png", images / "bus" / "001.png"
    code, out, err = command("predict", vehicles_run, first, second)
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == [str(first), str(second)]  # in the order of the command
    for _, label, probability in rows:
        assert label in CLASSES
        assert 1 / 3 <= float(probability) <= 1


def test_top_classes_are_in_order_of_probability_and_all_sum_to_one(
    vehicles_run: Path, images: Path, command: Command
) -> None:
    _, out, _ = command("predict", vehicles_run, images / "bus", "--top", 2)
    assert all(len(line.split("\t")) == 5 for line in out.splitlines())
    _, out, _ = command("predict", vehicles_run, images / "bus", "--top", 9, "--json")
    for line in objects(out):
        probabilities = [guess["probability"] for guess in line["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == approx(1, abs=1e-6)
        assert sorted(guess["label"] for guess in line["predictions"]) == CLASSES


def test_a_model_folder_predicts_like_its_run(
    vehicles_run: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    _, expected, _ = command("predict", vehicles_run, images)
    shutil.copytree(vehicles_run / "model", tmp_path / "anywhere")
    for where in (tmp_path / "anywhere", f"local-dir:{tmp_path / 'anywhere'}"):
        assert command("predict", where, images)[:2] == (1, expected)  # one image is unreadable


def test_folders_are_searched_recursively_in_the_order_of_paths(
    vehicles_run: Path, command: Command, tmp_path: Path
) -> None:
    write_images(tmp_path / "b" / "deep", 2, 100)
    write_images(tmp_path / "a", 1, 100)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "UPPER.PNG")
    _, out, err = command("predict", vehicles_run, tmp_path)
    names = [line.split("\t")[0] for line in out.splitlines()]
    assert names == [str(tmp_path / name) for name in ("a/UPPER.PNG", "b/deep/000.png", "b/deep/001.png")]
    assert err == ""


def test_file_names_that_are_not_utf8_are_read_and_printed(
    vehicles_run: Path, command: Command, tmp_path: Path
) -> None:
    odd = tmp_path / "caf\udce9.png"
    Image.new("RGB", (40, 40)).save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(odd)
    code, out, _ = command("predict", vehicles_run, odd)
    assert code == 0
    assert out.startswith(f"{tmp_path}/caf\\xe9.png\t")
    assert objects(command("predict", vehicles_run, odd, "--json")[1])[0]["path"] == str(odd)


def test_only_unreadable_images_exit_with_1(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("text")
    code, out, err = command("predict", vehicles_run, tmp_path)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        f"{tmp_path / 'empty.jpg'}: cannot be decoded: zero bytes",
        f"{tmp_path / 'text.jpg'}: cannot be decoded: not an image",
        "error: 0 of 2 images could be decoded",
    ]


def test_a_closed_pipe_ends_the_command_without_a_traceback(vehicles_run: Path, images: Path) -> None:
    words = ["scripts/predict.py", vehicles_run, images, "--batch-size", 1, "--threads", 1]
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@mark.parametrize(
    ("config", "labels"),
    [
        ({}, [str(index) for index in range(1000)]),
        ({"label_names": [f"kind {index}" for index in range(1000)]}, [f"kind {index}" for index in range(1000)]),
        ({"label_names": {index: f"kind {index}" for index in range(1000)}}, [f"kind {i}" for i in range(1000)]),
        ({"pretrained_cfg": {"tag": "r160_in1k"}}, timm.data.ImageNetInfo().label_descriptions()),
    ],
    ids=["none", "list", "map", "imagenet"],
)
def test_labels_are_stated_or_imagenets_or_class_indices(
    config: dict, labels: list[str], command: Command, tmp_path: Path
) -> None:
    model = small_model(tmp_path / "model-folder", **config)
    write_images(tmp_path / "images", 1, 100)
    _, out, _ = command("predict", model, tmp_path / "images", "--json", "--top", 1000)
    guesses = objects(out)[0]["predictions"]
    assert [guess["label"] for guess in sorted(guesses, key=lambda guess: guess["index"])] == labels


def test_a_model_on_the_hub_predicts(vehicles_run: Path, images: Path, command: Command, tmp_path: Path) -> None:
    _, expected, _ = command("predict", vehicles_run, images)
    files = {name: (vehicles_run / "model" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with serve() as hub:
        hub.create("models", "me/vehicles").commit("weights", files)
        words = ("scripts/predict.py", "hf-hub:me/vehicles", images, "--threads", 1)
        done = run_process(*words, HF_HOME=str(tmp_path), **hub.environment())
    assert done.returncode == 1, done.stderr  # one image is unreadable
    assert done.stdout == expected


@mark.parametrize(
    ("flags", "parts"),
    [
        (["--top", "0"], ["--top: 0: expected a whole number from 1 to"]),
        (["--batch-size", "-1"], ["--batch-size: -1: expected a whole number from 1 to"]),
        (["--threads", "none"], ["--threads: none: expected auto or a number of threads from 1 to"]),
    ],
)
def test_a_wrong_number_exits_with_2(flags: list[str], parts: list[str], command: Command) -> None:
    code, _, err = command("predict", "nowhere", "nothing.jpg", *flags)
    assert code == 2
    for part in parts:
        assert part in err


def test_an_invalid_model_exits_with_2_and_one_line(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1, 100)
    unnamed = small_model(tmp_path / "unnamed", label_names=["one"])
    foreign = small_model(tmp_path / "foreign", architecture="test_vit")
    unknown = small_model(tmp_path / "unknown", architecture="sparkle")
    no_json = small_model(tmp_path / "no-json")
    (no_json / "config.json").write_text("{")
    damaged = small_model(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"1234")
    without = small_model(tmp_path / "without")
    (without / "model.safetensors").unlink()
    for where, part in (
        ("resnext_g8", "resnext_g8 has no released weights; use one of resnext101_g1"),
        (tmp_path, "is not a trained model"),
        (unnamed, "1 names for 1000 classes: expected one per class"),
        (foreign, "model.safetensors does not match the architecture in config.json (test_vit"),
        (unknown, 'config.json has architecture "sparkle": unknown to timm'),
        (no_json, "config.json is damaged (Input data was truncated)"),
        (damaged, "model.safetensors cannot be read (Error while deserializing header"),
        (without, "there is no model.safetensors in"),
    ):
        code, out, err = command("predict", where, tmp_path / "images")
        assert (code, out) == (2, ""), err
        assert part in err
        assert err.count("\n") == 1
        assert "--model" not in err


def test_a_model_on_an_unreachable_hub_exits_with_1(command: Command, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1, 100)
    code, _, err = command("predict", "hf-hub:me/vehicles", tmp_path / "images")
    assert code == 1
    assert "hf-hub:me/vehicles: config.json of me/vehicles is not in the cache, and the Hub could not be reached" in err


def test_paths_without_images_exit_with_2(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    for path, part in (
        (tmp_path, "contains no images; known suffixes: .avif"),
        (tmp_path / "x.jpg", "no such file or folder"),
    ):
        code, _, err = command("predict", vehicles_run, path)
        assert code == 2
        assert part in err


def test_paths_that_are_not_regular_files_are_refused_and_never_opened(command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "odd\n\x1b.jpg").symlink_to("odd\n\x1b.jpg")
    for name, reason in (
        ("fifo.jpg", "is not a regular file"),
        ("device.jpg", "is not a regular file"),
        ("dangling.jpg", "no such file or folder"),
    ):
        code, out, err = command("predict", "any", tmp_path / name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{name}" in err
        assert reason in err
    with raises(RequestError, match=r"odd\\n\\x1b.jpg cannot be read: Too many levels of symbolic links"):
        find_images([tmp_path / "odd\n\x1b.jpg"])


def test_odd_names_keep_lines_columns_and_json_intact(command: Command, tmp_path: Path) -> None:
    model = small_model(tmp_path / "model-folder", label_names=[f"{n}a\tb\nc\x1b[1m\u202e\x7f" for n in range(1000)])
    odd = tmp_path / "x\t\n\x1b.png"
    write_images(tmp_path / "images", 1, 100)
    (tmp_path / "images" / "000.png").rename(odd)
    _, out, _ = command("predict", model, odd)
    path, label, _ = out.split("\t")
    assert (path, label.lstrip("0123456789")) == (f"{tmp_path}/x\\t\\n\\x1b.png", "a\\tb\\nc\\x1b[1m\\u202e\\x7f")
    assert out.count("\n") == 1
    _, out, _ = command("predict", model, odd, "--json")
    (line,) = objects(out)
    assert line["path"] == str(odd)
    assert line["predictions"][0]["label"].endswith("a\tb\nc\x1b[1m\u202e\x7f")
    assert out[:-1].isprintable()


def test_images_above_the_pixel_limit_are_unreadable(command: Command, tmp_path: Path) -> None:
    model = small_model(tmp_path / "model-folder")
    write_images(tmp_path / "images", 1, 100)
    for decoder in ("pil", "simplejpeg"):
        code, _, err = command("predict", model, tmp_path / "images", "--max-image-pixels", 1000, "--decoder", decoder)
        assert code == 1
        assert "40 x 40 is more than 1000 pixels (limit: max_image_pixels)" in err


def test_probabilities_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1, 100)
    model = load(str(small_model(tmp_path / "model-folder")))
    next(model.model.parameters()).data.fill_(float("nan"))
    with raises(RunError, match="the probabilities are not finite: check the model's weights"):
        list(predict(model, find_images([tmp_path / "images"]), batch_size=1, device=torch.device("cpu")))


def test_plots_of_a_run_are_not_classified(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "curves.png")
    assert find_images([tmp_path]) == [tmp_path / "curves.png"]
    for name in ("config.yaml", "record.json"):
        (tmp_path / name).write_text("{}")
    with raises(RequestError, match="is a run folder whose images are plots"):
        find_images([tmp_path])


def test_paths_come_from_patterns_and_standard_input(
    vehicles_run: Path, images: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    expected = command("predict", vehicles_run, *sorted((images / "bus").glob("*.png")))
    assert expected[0] == 0
    assert command("predict", vehicles_run, images / "bus" / "*.png") == expected
    assert command("predict", vehicles_run, images / "**" / "bus" / "*.png") == expected
    code, _, err = command("predict", vehicles_run, images / "*.gif")
    assert (code, err.count("\n")) == (2, 1)
    assert "no file matches this pattern" in err
    listed = "".join(f"{path}\n" for path in sorted((images / "bus").glob("*.png")))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    assert command("predict", vehicles_run, "-") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    code, _, err = command("predict", vehicles_run, "-")
    assert code == 2
    assert "standard input contains no paths" in err


def test_csv_and_parquet_hold_what_json_holds(
    vehicles_run: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    lines = objects(command("predict", vehicles_run, images, "--json", "--top", 2)[1])
    code, out, _ = command("predict", vehicles_run, images, "--csv", "--top", 2)
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    expected = [
        {"path": line["path"], "rank": str(rank), "label": guess["label"], "error": "",
         "probability": f"{guess['probability']:.6f}", "unsure": "", "ood_score": ""}
        for line in lines for rank, guess in enumerate(line.get("predictions", []), 1)
    ]  # fmt: skip
    assert [row for row in rows if not row["error"]] == expected
    assert [row["path"] for row in rows if row["error"] == "not an image"] == [
        line["path"] for line in lines if "error" in line
    ]
    code, out, _ = command("predict", vehicles_run, images, "--parquet", tmp_path / "found.parquet", "--top", 2)
    assert (code, out) == (1, "")
    table = parquet.read_table(tmp_path / "found.parquet").to_pylist()
    assert [row["path"] for row in table] == [line["path"] for line in lines]
    assert [row["labels"] for row in table] == [[g["label"] for g in line.get("predictions", [])] for line in lines]
    assert [row["probabilities"] for row in table] == [
        [g["probability"] for g in line.get("predictions", [])] for line in lines
    ]
    assert [row["error"] for row in table] == [line.get("error") for line in lines]
    code, _, err = command("predict", vehicles_run, images, "--csv", "--json")
    assert code == 2
    assert "not allowed with" in err


def test_a_threshold_leaves_out_less_probable_classes(vehicles_run: Path, images: Path, command: Command) -> None:
    whole = objects(command("predict", vehicles_run, images, "--json", "--top", 3)[1])
    some = objects(command("predict", vehicles_run, images, "--json", "--top", 3, "--threshold", 0.4)[1])
    for before, after in zip(whole, some, strict=True):
        if "error" not in before:
            assert after["predictions"] == [guess for guess in before["predictions"] if guess["probability"] >= 0.4]
    assert any(len(line.get("predictions", [])) < 3 for line in some)
    none = objects(command("predict", vehicles_run, images / "bus", "--json", "--threshold", 1)[1])
    assert all(line["predictions"] == [] or line["predictions"][0]["probability"] == 1 for line in none)
    code, _, err = command("predict", vehicles_run, images, "--threshold", 2)
    assert code == 2
    assert "expected a number from 0 to 1" in err


def test_embeddings_are_the_input_of_the_classifier(
    vehicles_run: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    code, out, err = command("predict", vehicles_run, images, "--embed", tmp_path / "found.parquet")
    assert (code, out) == (1, "")
    assert "1 of 37 images could not be decoded" in err
    table = parquet.read_table(tmp_path / "found.parquet").to_pylist()
    model = timm.create_model(f"local-dir:{vehicles_run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for row in table[:3]:
        image = transform(Image.open(row["path"]).convert("RGB"))[None]
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(image), pre_logits=True)[0]
            logits = model(image)[0]
        torch.testing.assert_close(torch.tensor(row["embedding"]), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.get_classifier()(expected), logits, rtol=1e-4, atol=1e-5)
    assert [row["error"] for row in table if row["embedding"] is None] == ["not an image"]
    classifier = resnext_hub.load(vehicles_run)
    torch.testing.assert_close(classifier.embed(table[0]["path"])[0], torch.tensor(table[0]["embedding"]))


def test_a_terminal_shows_bars(vehicles_run: Path, images: Path) -> None:
    main, other = pty.openpty()
    words = [sys.executable, "-m", "resnext_hub", "predict", str(vehicles_run), str(images / "bus"), "--top", "2"]
    with subprocess.Popen(words, cwd=ROOT, stdout=other, stderr=subprocess.DEVNULL) as run:
        os.close(other)
        found = b""
        with contextlib.suppress(OSError):  # raised when the other end is closed
            while some := os.read(main, 4096):
                found += some
        assert run.wait() == 0
    os.close(main)
    lines = found.decode().splitlines()
    assert len(lines) == 3 * 12
    assert all(re.fullmatch(r"  (bus|car|train) +█*·* +\d+\.\d %", line) for line in lines if line.startswith("  "))
    assert lines[0] == str(sorted((images / "bus").glob("*.png"))[0])
