"""OpenVINO's files give torch's logits, and int8 is written only where the held-out images bear it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pytest import TempPathFactory, fixture, importorskip, mark, raises
from support.processes import ROOT, run_process, save_with_timm

from resnext_hub.errors import RequestError, RunError
from resnext_hub.export.runtime import Int8, export
from resnext_hub.inference.classifier import Classifier, load
from resnext_hub.kernels.merged import grouped_convolutions
from resnext_hub.runs.calibration import prepare_int8

openvino = importorskip("openvino")

Command = Callable[..., tuple[int, str, str]]


@fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@fixture(scope="module")
def exported(vehicles_run: Path) -> Path:
    done = run_process("-W", "error", "scripts/export.py", vehicles_run, "--format", "openvino", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "OpenVINO against torch, at batch sizes 1, 2, 7: largest error" in done.stdout
    return vehicles_run / "model.xml"


@fixture(scope="module")
def grouped(tmp_path_factory: TempPathFactory) -> Classifier:
    return load(str(save_with_timm(tmp_path_factory.mktemp("grouped") / "model", "resnext26_g32", 64)))


def logits(file: Path, images: torch.Tensor) -> np.ndarray:
    """What somebody would write who has the file and OpenVINO."""
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({"images": images.numpy()})["logits"])


def test_the_files_give_torchs_logits_and_tell_labels_and_preprocessing(exported: Path, vehicles_run: Path) -> None:
    model = load(str(vehicles_run))
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model.model(images).numpy()
        np.testing.assert_allclose(logits(exported, images), expected, rtol=1e-4, atol=1e-4)
    content = openvino.Core().read_model(exported)
    facts = {name: content.get_rt_info(["resnext_hub", name]).astype(str) for name in ("label_names", "preprocessing")}
    assert json.loads(facts["label_names"]) == ["bus", "car", "train"]
    assert json.loads(facts["preprocessing"])["input_size"] == [3, 32, 32]


def test_the_files_name_no_path_of_this_machine(exported: Path) -> None:
    text = exported.read_text()
    for word in (str(ROOT), str(exported.parent.parent), "site-packages", ".py"):
        assert word not in text, word
    assert not list(exported.parent.glob(".*/*"))


@mark.parametrize("format", ["onnx", "openvino"])
def test_a_merged_file_computes_the_same_in_wider_groups(format: str, grouped: Classifier, tmp_path: Path) -> None:
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[format]
    done = export(grouped, format, tmp_path / f"merged{suffix}", merge=16)  # type: ignore[arg-type]
    export(grouped, format, tmp_path / f"plain{suffix}")  # type: ignore[arg-type]
    (tmp_path / "merged.bin" if format == "onnx" else tmp_path / "merged.onnx").write_bytes(b"of another export")
    assert done.relative_error < 1e-5
    assert {layer.merged_width for layer in done.layers} == {16, 32}
    sizes = [
        sum(path.stat().st_size for path in tmp_path.glob(f"{name}.*") if path.read_bytes() != b"of another export")
        for name in ("merged", "plain")
    ]
    assert sizes[0] == done.size
    assert sizes[0] > sizes[1]  # by the zeros of the block-diagonal weights
    assert {conv.groups for conv in grouped_convolutions(grouped.model).values()} == {32}


def test_auto_takes_for_each_layer_what_openvino_is_fastest_at(grouped: Classifier, tmp_path: Path) -> None:
    assert export(grouped, "openvino", tmp_path / "model.xml", merge="measure").relative_error < 1e-5
    with raises(RequestError, match="--merge-groups auto is measured by OpenVINO"):
        export(grouped, "onnx", tmp_path / "model.onnx", merge="measure")


@mark.parametrize("format", ["onnx", "openvino"])
def test_int8_tells_exact_counts_before_and_after(format: str, vehicles_run: Path, command: Command) -> None:
    code, out, err = command("export", vehicles_run, "--format", format, "--int8", "--max-drop", "100", "--threads", 1)
    assert (code, err) == (0, "")
    held_out = json.loads((vehicles_run / "record.json").read_text())["evaluation"]
    before = f"{held_out['correct']} of {held_out['count']} right before, "
    assert f"int8 on the held-out images: {before}" in out
    assert 1e-4 < float(re.search(r"logits differ by (\S+) \(norm over norm\)", out)[1]) < 0.5
    file = vehicles_run / {"onnx": "model-int8.onnx", "openvino": "model-int8.xml"}[format]
    content = file.read_bytes()
    assert b"QuantizeLinear" in content or b"FakeQuantize" in content
    assert str(ROOT).encode() not in content
    assert b'["bus", "car", "train"]' in content or b"[&quot;bus&quot;, &quot;car&quot;, &quot;train&quot;]" in content


def test_int8_that_costs_too_much_is_refused_with_the_figures_and_leaves_no_file(
    vehicles_run: Path, tmp_path: Path
) -> None:
    model = load(str(vehicles_run))
    asked = prepare_int8(model, None, 0.5)
    held_out = json.loads((vehicles_run / "record.json").read_text())["evaluation"]
    correct, count = held_out["correct"], held_out["count"]
    # ranges from images without any contrast tell nothing of real ones
    spoilt = Int8(calibration=torch.zeros_like(asked.calibration), samples=asked.samples, max_drop=0.5)
    with raises(RunError, match=rf"int8 costs \S+ points of top-1 .*: {correct} of {count} right before, \d+ after"):
        export(model, "openvino", tmp_path / "model.xml", int8=spoilt)
    assert list(tmp_path.iterdir()) == []


def test_int8_calibrates_on_training_images_and_counts_the_readable_held_out_ones(
    vehicles_run: Path, tmp_path: Path
) -> None:
    model = load(str(vehicles_run))
    asked = prepare_int8(model, None, 0.5)
    assert asked.calibration.shape == (60, 3, 32, 32)
    done = export(model, "openvino", tmp_path / "model.xml", int8=replace(asked, max_drop=100))
    assert done.int8 is not None
    assert done.int8.count == 36  # of 37, of which one is broken


def test_requests_that_cannot_be_are_refused_in_a_line(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    for arguments, part in (
        ((vehicles_run, "--int8", "--max-drop", -1), "--max-drop: -1.0: expected a number from 0 to 100"),
        ((vehicles_run, "--max-drop", 1), "--calibration and --max-drop go with --int8"),
        ((vehicles_run, "--merge-groups", "wide"), "wide: expected off, auto or a number of channels"),
        ((vehicles_run, "--int8", "--calibration", "digits"), "--calibration digits has the classes 0, 1, 2"),
        ((vehicles_run / "model", "--output", tmp_path / "model.bin", "--format", "openvino"), "ends in .xml"),
    ):
        code, _, err = command("export", *arguments)
        assert code == 2, err
        assert part in err
        assert err.count("\n") == 1


def test_nothing_is_reported_to_others_and_no_file_is_left_at_home(tmp_path: Path) -> None:
    code = """
import os, sys
asked = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
sys.addaudithook(lambda event, details: asked.append(event) if event in watched else None)
import torch
from torch import nn
from resnext_hub.inference.optimize import optimize
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
images = torch.randn(2, 3, 16, 16)
fast = optimize(model, images, engine="openvino", merge="off", calibration=images)
assert fast.report.dtype == "int8"
print(asked, [name for _, _, names in os.walk(os.environ["HOME"]) for name in names])
"""
    done = run_process("-W", "ignore", "-c", code, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] []\n"
