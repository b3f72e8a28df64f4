"""ONNX files reproduce torch's logits in ONNX Runtime, and are enough on their own to classify an image."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from pytest import MonkeyPatch, fixture, importorskip, mark, param, raises
from support.processes import ROOT, run_process, save_with_timm
from torch import nn

from resnext_hub.errors import RequestError, RunError
from resnext_hub.export import onnx as exporting
from resnext_hub.export.runtime import TOLERANCE, export
from resnext_hub.inference.classifier import load

Command = Callable[..., tuple[int, str, str]]

WITH_ONNX, WITH_OPENVINO, *_ = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/how-to/export.md").read_text(), re.DOTALL
)
"""The snippets of docs/how-to/export.md, which use only a file."""

ALONE = """
import sys
for name in ("torch", "torchvision", "timm", "resnext_hub"):
    sys.modules[name] = None  # makes importing it fail
"""

EACH = """
for path in sys.argv[1:]:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    probabilities, label = session.run(["probabilities", "label"], {"images": pixels[None]})
    print(json.dumps([names[label[0]], float(probabilities.max())]))
"""


@fixture(scope="module")
def exported(vehicles_run: Path) -> Path:
    done = run_process("-W", "error", "scripts/export.py", vehicles_run, "--format", "onnx")
    assert (done.returncode, done.stderr) == (0, "")
    file = vehicles_run / "model.onnx"
    assert done.stdout.startswith(f"{file}: ")
    assert "RGB images (N, height, width, 3) uint8 to probabilities, label, embedding" in done.stdout
    assert "ONNX Runtime against torch, at batch sizes 1, 2, 7: largest error" in done.stdout
    return file


@fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread: with several, small models wait for each other's threads on a busy machine."""
    torch.set_num_threads(1)


def facts_of(file: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_the_file_alone_classifies_images_as_predict_does(exported: Path, vehicles_run: Path, command: Command) -> None:
    validation = vehicles_run.parent / "vehicles" / "validation"
    images = [validation / kind / f"{index:03d}.png" for kind in ("bus", "car", "train") for index in range(7)]
    # seven different widths, so resizing and cropping matter
    snippet = WITH_ONNX.replace("runs/NAME/model.onnx", str(exported)).replace("image.jpg", str(images[0]))
    done = run_process("-c", ALONE + snippet + EACH, *images)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert first == found[0][0]
    _, out, _ = command("predict", vehicles_run, *images, "--json")
    expected = [json.loads(line)["predictions"][0] for line in out.splitlines()]
    assert [label for label, _ in found] == [guess["label"] for guess in expected]
    # a pixel may differ by one gray level, and float32 sums are in another order
    np.testing.assert_allclose([p for _, p in found], [guess["probability"] for guess in expected], atol=0.01)


def test_the_openvino_snippet_of_the_docs_runs(vehicles_run: Path, tmp_path: Path) -> None:
    importorskip("openvino")
    file = export(load(str(vehicles_run)), "openvino", tmp_path / "model.xml").path
    image = vehicles_run.parent / "vehicles" / "validation" / "bus" / "000.png"
    snippet = WITH_OPENVINO.replace("runs/NAME/model.xml", str(file)).replace("image.jpg", str(image))
    done = run_process("-c", ALONE + snippet)
    assert (done.returncode, done.stdout) == (0, "bus\n"), done.stderr


def test_the_metadata_has_labels_preprocessing_license_and_source(exported: Path) -> None:
    facts = facts_of(exported)
    assert json.loads(facts["label_names"]) == ["bus", "car", "train"]
    config = json.loads((exported.parent / "model" / "config.json").read_text())
    how = json.loads(facts["preprocessing"])
    assert how == {key: config["pretrained_cfg"][key] for key in how}
    assert set(how) == {"input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std"}
    assert (facts["license"], facts["source"], facts["architecture"]) == ("unknown", "run/model", "test_resnet")
    assert "images: uint8 RGB, (N, height, width, 3), of any size and upright" in onnx.load(exported).doc_string


def test_the_file_is_valid_and_contains_no_local_path(exported: Path) -> None:
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    content = exported.read_bytes()
    for word in (str(ROOT), str(exported.parent.parent), "site-packages", ".py", "File "):
        assert word.encode() not in content, word


@mark.parametrize(
    ("name", "size"),
    [
        ("resnext29_g32_w4", 32),
        param("resnext_g32", 64, marks=mark.slow),
        param("test_vit_relpos", 160, marks=mark.slow),
    ],
)
def test_onnx_runtime_reproduces_the_logits_at_any_batch_size(name: str, size: int, tmp_path: Path) -> None:
    model = load(str(save_with_timm(tmp_path / "model", name, size)))
    done = export(model, "onnx", raw=True)
    assert done.path == tmp_path / "model.onnx"
    assert done.absolute_error > 0
    assert done.relative_error < TOLERANCE / 10  # far from the tolerance, so it rejects no correct file
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 3, size, size])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    for count in (1, 5):  # the export itself does not compare a batch of 5
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model.model(images).numpy()
        (found,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@mark.slow
def test_export_is_deterministic(exported: Path, vehicles_run: Path, tmp_path: Path) -> None:
    done = export(load(str(vehicles_run)), "onnx", tmp_path / "deep" / "again.onnx")
    assert done.path.read_bytes() == exported.read_bytes()


@mark.slow
def test_an_error_above_the_tolerance_raises_and_leaves_no_file(vehicles_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    with raises(RunError, match=r"logits of ONNX Runtime differ from torch's by \S+, or \S+ of the largest logit"):
        export(load(str(vehicles_run)), "onnx", path, tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


class _FixedBatch(nn.Module):
    """A model of three logits with a factor that depends on the batch size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] * (2 if len(images) == 2 else 1)


class _Branching(nn.Module):
    """A model of three logits with data-dependent control flow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] * (2 if images.sum() > 0 else 1)


class _Random(nn.Module):
    """A model whose logits are random."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] + torch.randn(1)


@mark.parametrize(
    ("module", "reason"),
    [
        (_FixedBatch(), "the model fixes the batch size of its pixels to 2; expected a dynamic batch size"),
        (_Branching(), "torch.onnx cannot export the model: Could not guard on data-dependent expression"),
        (_Random(), "the logits of ONNX Runtime differ from torch's"),
    ],
    ids=["fixed-batch", "branching", "random"],
)
def test_a_model_that_cannot_be_exported_raises_one_line_and_leaves_no_file(
    module: nn.Module, reason: str, vehicles_run: Path, tmp_path: Path
) -> None:
    model = replace(load(str(vehicles_run)), model=module.eval())
    with raises(RunError) as raised:
        export(model, "onnx", tmp_path / "model.onnx")
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_two_gib_is_rejected_before_any_work(vehicles_run: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2**15, 2**14 + 1)
    with raises(RequestError, match=r"2\.1 GB of weights, but an ONNX file holds at most 2 GiB"):
        export(replace(load(str(vehicles_run)), model=module), "onnx", tmp_path / "model.onnx")


def test_a_file_from_the_hub_is_named_after_the_repository_and_keeps_the_license(
    vehicles_run: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    like = load(str(vehicles_run))
    facts = {"requested": "hf-hub:me/vehicles@v1", "base_id": "me/vehicles@v1", "base_license": "cc-by-4.0"}
    done = export(replace(like, source=replace(like.source, **facts)), "onnx")
    assert done.path == Path("vehicles.onnx")
    properties = facts_of(done.path)
    assert (properties["source"], properties["license"]) == ("me/vehicles@v1", "cc-by-4.0")


@mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_reported_with_its_extra(
    package: str, vehicles_run: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, exporting.__name__)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = command("export", vehicles_run)
    assert (code, out) == (2, "")
    assert err == f'error: {package} is not installed; pip install "resnext-hub[onnx]"\n'


def test_an_invalid_output_path_exits_with_2(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, part in (
        (tmp_path, f"--output {tmp_path} is a folder; expected a file"),
        (tmp_path / "file" / "model.onnx", f"cannot be created: {tmp_path / 'file'} is not a folder"),
    ):
        code, _, err = command("export", vehicles_run, "--output", path)
        assert code == 2
        assert part in err
    code, _, err = command("export", vehicles_run, "--format", "sparkle")
    assert code == 2
    assert "--format: sparkle is not one of onnx, openvino, torch" in err
