"""OpenVINO files reproduce torch's logits, and int8 files are written only if accuracy holds."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pytest import TempPathFactory, fixture, importorskip, mark, raises
from support.processes import ROOT, run_process, save_with_timm
from support.runtimes import openvino_core

from resnext_hub.errors import RequestError, RunError
from resnext_hub.export.runtime import export
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
    done = run_process(
        "-W", "error", "scripts/export.py", vehicles_run, "--format", "openvino", "--raw", "--threads", "1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "OpenVINO against torch, at batch sizes 1, 2, 7: largest error" in done.stdout
    return vehicles_run / "model.xml"


@fixture(scope="module")
def grouped(tmp_path_factory: TempPathFactory) -> Classifier:
    return load(str(save_with_timm(tmp_path_factory.mktemp("grouped") / "model", "resnext26_g32", 64)))


def logits(file: Path, images: torch.Tensor) -> np.ndarray:
    """Return the logits of plain OpenVINO, as a user of the file computes them."""
    compiled = openvino_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({"images": images.numpy()})["logits"])


def test_the_files_reproduce_the_logits_and_hold_labels_and_preprocessing(exported: Path, vehicles_run: Path) -> None:
    model = load(str(vehicles_run))
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model.model(images).numpy()
        np.testing.assert_allclose(logits(exported, images), expected, rtol=1e-4, atol=1e-4)
    content = openvino_core().read_model(exported)
    facts = {name: content.get_rt_info(["resnext_hub", name]).astype(str) for name in ("label_names", "preprocessing")}
    assert json.loads(facts["label_names"]) == ["bus", "car", "train"]
    assert json.loads(facts["preprocessing"])["input_size"] == [3, 32, 32]


def test_the_files_contain_no_local_path(exported: Path) -> None:
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
    assert sizes[0] > sizes[1]  # because of the zeros in the block-diagonal weights
    assert {conv.groups for conv in grouped_convolutions(grouped.model).values()} == {32}


@mark.slow
def test_measured_widths_need_openvino(grouped: Classifier, tmp_path: Path) -> None:
    assert export(grouped, "openvino", tmp_path / "model.xml", merge="measure").relative_error < 1e-5
    with raises(RequestError, match="merge_groups=auto needs format=openvino"):
        export(grouped, "onnx", tmp_path / "model.onnx", merge="measure")


@mark.parametrize("format", ["onnx", "openvino"])
def test_int8_reports_exact_counts_before_and_after(format: str, vehicles_run: Path, command: Command) -> None:
    code, out, err = command("export", vehicles_run, "--format", format, "--int8", "--max-drop", "100", "--threads", 1)
    assert code == 0, err
    assert re.fullmatch(r"(int8 test \d+: accuracy drops by \S+ points \(upper confidence limit: \S+\)\n)+", err)
    held_out = json.loads((vehicles_run / "record.json").read_text())["evaluation"]
    before = f"({held_out['correct']}/{held_out['count']}) before and "
    assert re.search(rf"int8 on held-out images: accuracy \S+ % {re.escape(before)}", out)
    assert 1e-4 < float(re.search(r"relative error of the logits (\S+)", out)[1]) < 0.5
    file = vehicles_run / {"onnx": "model-int8.onnx", "openvino": "model-int8.xml"}[format]
    content = file.read_bytes()
    assert b"QuantizeLinear" in content or b"FakeQuantize" in content
    assert str(ROOT).encode() not in content
    assert b'["bus", "car", "train"]' in content or b"[&quot;bus&quot;, &quot;car&quot;, &quot;train&quot;]" in content


def test_int8_that_cannot_be_accurate_enough_raises_and_leaves_no_file(vehicles_run: Path, tmp_path: Path) -> None:
    model = load(str(vehicles_run))
    held_out = json.loads((vehicles_run / "record.json").read_text())["evaluation"]
    correct, count = held_out["correct"], held_out["count"]
    int8 = replace(prepare_int8(model, None, 0.5), max_drop=-100)  # asks for a gain
    with raises(RunError, match=rf"int8 loses \S+ points of top-1 accuracy.*\({correct}/{count}\) before"):
        export(model, "openvino", tmp_path / "model.xml", int8=int8)
    assert list(tmp_path.iterdir()) == []


def test_int8_calibrates_on_training_images_and_counts_the_readable_held_out_ones(
    vehicles_run: Path, tmp_path: Path
) -> None:
    model = load(str(vehicles_run))
    int8 = prepare_int8(model, None, 0.5)
    assert int8.calibration.shape == (60, 3, 32, 32)
    done = export(model, "openvino", tmp_path / "model.xml", int8=replace(int8, max_drop=100))
    assert done.int8 is not None
    assert done.int8.count == 36  # of 37, one of which is unreadable


def test_invalid_requests_are_reported_in_one_line(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    for arguments, part in (
        ((vehicles_run, "--int8", "--max-drop", -1), "--max-drop: -1.0: expected a number from 0 to 100"),
        ((vehicles_run, "--max-drop", 1), "--calibration and --max-drop need --int8"),
        ((vehicles_run, "--merge-groups", "wide"), "wide: expected off, auto or a number of channels"),
        ((vehicles_run, "--int8", "--calibration", "digits"), "--calibration digits has the classes 0, 1, 2"),
        ((vehicles_run / "model", "--output", tmp_path / "model.bin", "--format", "openvino"), "ending in .xml"),
    ):
        code, _, err = command("export", *arguments)
        assert code == 2, err
        assert part in err
        assert err.count("\n") == 1


@mark.slow
def test_openvino_sends_no_telemetry_and_writes_no_file_to_home(tmp_path: Path) -> None:
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
