"""`export --layout` writes model repositories that servers can load."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pytest import approx, fixture, importorskip, mark
from support.runtimes import openvino_core

from resnext_hub.inference.classifier import load

Command = Callable[..., tuple[int, str, str]]


@fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))


def test_the_repository_of_openvino_model_server_names_the_folder_of_the_file(
    finished: Path, tmp_path: Path, command: Command, image: Image.Image
) -> None:
    importorskip("openvino")
    flags = ("--format", "openvino", "--layout", "ovms", "--output", tmp_path / "models", "--threads", 1)
    code, out, err = command("export", finished, *flags)
    assert code == 0, err
    (entry,) = json.loads((tmp_path / "models" / "config.json").read_text())["model_config_list"]
    assert set(entry) == {"config"}
    assert set(entry["config"]) == {"name", "base_path"}  # the server refuses keys that its schema does not have
    name, folder = entry["config"]["name"], tmp_path / "models" / entry["config"]["base_path"]
    assert out.splitlines()[-1] == f"{tmp_path / 'models' / 'config.json'}: configuration of the model {name}"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == ["1/model.bin", "1/model.xml"]
    compiled = openvino_core().compile_model(folder / "1" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"images": np.asarray(image)[None]})["probabilities"]
    assert found[0] == approx(load(finished)(image)[0].numpy(), abs=0.01)


def test_the_configuration_for_triton_describes_the_inputs_and_outputs_of_the_file(
    finished: Path, tmp_path: Path, command: Command, image: Image.Image
) -> None:
    onnxruntime = importorskip("onnxruntime")
    importorskip("onnxscript")
    flags = ("--format", "onnx", "--layout", "triton", "--output", tmp_path / "models", "--threads", 1)
    code, _, err = command("export", finished, *flags)
    assert code == 0, err
    (folder,) = (tmp_path / "models").iterdir()
    text = (folder / "config.pbtxt").read_text()
    assert re.search(rf'^name: "{folder.name}"$', text, re.MULTILINE)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
    expected = {value.name: f"TYPE_{kinds[value.type]}" for value in (*session.get_inputs(), *session.get_outputs())}
    found = re.findall(r'name: "(\w+)" data_type: (\w+) dims: \[ ([\d, -]+) \]( reshape: \{ shape: \[ \] \})?', text)
    assert {name: kind for name, kind, _, _ in found} == expected
    pixels = np.asarray(image)[None]
    answers = dict(zip(expected, [pixels, *session.run(None, {"images": pixels})], strict=True))
    for name, _, dims, scalar in found:
        sides = [] if scalar else [int(side) for side in dims.split(",")]
        assert len(sides) == answers[name].ndim - 1, name  # without the batch
        assert all(side in (-1, length) for side, length in zip(sides, answers[name].shape[1:], strict=True)), name
    assert answers["probabilities"][0] == approx(load(finished)(image)[0].numpy(), abs=0.01)
    assert (folder / "labels.txt").read_text().splitlines() == list(load(finished).label_names)
    assert 'name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt"' in text


def test_tritons_own_parser_reads_the_configuration(finished: Path, tmp_path: Path, command: Command) -> None:
    importorskip("onnxscript")
    configuration = importorskip("tritonclient.grpc.model_config_pb2")
    text_format = importorskip("google.protobuf.text_format")
    command("export", finished, "--layout", "triton", "--output", tmp_path / "models", "--threads", 1)
    (file,) = tmp_path.rglob("config.pbtxt")
    parsed = text_format.Parse(file.read_text(), configuration.ModelConfig())
    assert (parsed.backend, parsed.max_batch_size) == ("onnxruntime", 32)
    assert [list(entry.dims) for entry in parsed.input] == [[-1, -1, 3]]
    assert [entry.name for entry in parsed.output][:3] == ["probabilities", "label", "embedding"]
    assert parsed.HasField("dynamic_batching")


@mark.parametrize(
    ("flags", "reason"),
    [
        (("--layout", "triton", "--format", "openvino"), "--layout triton needs --format onnx"),
        (("--layout", "triton", "--format", "torch"), "--layout triton needs --format onnx"),
        (("--layout", "ovms"), "--layout ovms needs --format openvino"),
        (("--layout", "triton", "--raw"), "--layout triton is for files that contain the preprocessing; omit --raw"),
    ],
)
def test_a_layout_that_cannot_hold_the_file_is_refused(
    flags: tuple[str, ...], reason: str, finished: Path, tmp_path: Path, command: Command
) -> None:
    code, out, err = command("export", finished, *flags, "--output", tmp_path / "models")
    assert (code, out, err) == (2, "", f"error: {reason}\n")
    assert not (tmp_path / "models").exists()
