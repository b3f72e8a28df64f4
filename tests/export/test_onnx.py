"""An exported file gives torch's logits in ONNX Runtime, and suffices by itself to classify an image."""

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
from pytest import MonkeyPatch, fixture, importorskip, mark, raises
from support.processes import ROOT, run_process, save_with_timm
from torch import nn

from resnext_hub.errors import RequestError, RunError
from resnext_hub.export import onnx as exporting
from resnext_hub.export.runtime import TOLERANCE, export
from resnext_hub.inference.classifier import load

Command = Callable[..., tuple[int, str, str]]

PREPARE, WITH_ONNX, WITH_OPENVINO = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/how-to/export.md").read_text(), re.DOTALL
)
"""What somebody writes who has a file and its metadata, as the documentation shows it."""

ALONE = """
import sys
for name in ("torch", "torchvision", "timm", "resnext_hub"):
    sys.modules[name] = None  # importing it says that there is no such module
"""

EACH = """
for path in sys.argv[1:]:
    (logits,) = session.run(["logits"], {"images": prepare(path, how)})
    powers = np.exp(logits[0] - logits[0].max())
    print(json.dumps([names[int(powers.argmax())], float(powers.max() / powers.sum())]))
"""


@fixture(scope="module")
def exported(vehicles_run: Path) -> Path:
    done = run_process("-W", "error", "scripts/export.py", vehicles_run, "--format", "onnx")
    assert (done.returncode, done.stderr) == (0, "")
    file = vehicles_run / "model.onnx"
    assert done.stdout.startswith(f"{file}: ")
    assert "normalized images (N, 3, 32, 32) float32 to logits (N, 3)" in done.stdout
    assert "ONNX Runtime against torch, at batch sizes 1, 2, 7: largest error" in done.stdout
    return file


@fixture(autouse=True)
def _one_thread() -> None:
    """Let small networks not wait for each other's threads where the machine has other work."""
    torch.set_num_threads(1)


def facts_of(file: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_the_file_alone_classifies_images_as_predict_does(exported: Path, vehicles_run: Path, command: Command) -> None:
    validation = vehicles_run.parent / "vehicles" / "validation"
    images = [validation / kind / f"{index:03d}.png" for kind in ("bus", "car", "train") for index in range(7)]
    # of seven widths, so that resizing and cropping matter
    shown = WITH_ONNX.replace("runs/NAME/model.onnx", str(exported)).replace("image.jpg", str(images[0]))
    done = run_process("-c", ALONE + PREPARE + shown + EACH, *images)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert first == found[0][0]
    _, out, _ = command("predict", vehicles_run, *images, "--json")
    expected = [json.loads(line)["predictions"][0] for line in out.splitlines()]
    assert [label for label, _ in found] == [guess["label"] for guess in expected]
    # other sums of float32, of the same pixels
    np.testing.assert_allclose([p for _, p in found], [guess["probability"] for guess in expected], rtol=1e-5)


def test_what_the_page_on_exported_files_shows_of_openvino_runs(vehicles_run: Path, tmp_path: Path) -> None:
    importorskip("openvino")
    file = export(load(str(vehicles_run)), "openvino", tmp_path / "model.xml").path
    image = vehicles_run.parent / "vehicles" / "validation" / "bus" / "000.png"
    shown = WITH_OPENVINO.replace("runs/NAME/model.xml", str(file)).replace("image.jpg", str(image))
    done = run_process("-c", ALONE + PREPARE + shown)
    assert (done.returncode, done.stdout) == (0, "bus\n"), done.stderr


def test_the_metadata_names_labels_preprocessing_licence_and_source(exported: Path) -> None:
    facts = facts_of(exported)
    assert json.loads(facts["label_names"]) == ["bus", "car", "train"]
    config = json.loads((exported.parent / "model" / "config.json").read_text())
    how = json.loads(facts["preprocessing"])
    assert how == {key: config["pretrained_cfg"][key] for key in how}
    assert set(how) == {"input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std"}
    assert (facts["license"], facts["source"], facts["architecture"]) == ("unknown", "run/model", "test_resnet")
    assert "the shorter edge is floor(size / crop_pct) pixels" in onnx.load(exported).doc_string


def test_the_file_is_valid_and_names_no_path_of_this_machine(exported: Path) -> None:
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    content = exported.read_bytes()
    for word in (str(ROOT), str(exported.parent.parent), "site-packages", ".py", "File "):
        assert word.encode() not in content, word


@mark.parametrize(("name", "size"), [("resnext_g32", 64), ("resnext29_g32_w4", 32), ("test_vit_relpos", 160)])
def test_onnx_runtime_gives_torchs_logits_at_any_number_of_images(name: str, size: int, tmp_path: Path) -> None:
    model = load(str(save_with_timm(tmp_path / "model", name, size)))
    done = export(model, "onnx")
    assert done.path == tmp_path / "model.onnx"
    assert done.absolute_error > 0
    assert done.relative_error < TOLERANCE / 10  # so that the tolerance refuses nothing that is right
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 3, size, size])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    for count in (1, 5):  # 5 is none of the sizes that the export itself compares
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model.model(images).numpy()
        (found,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_the_same_model_gives_the_same_bytes(exported: Path, vehicles_run: Path, tmp_path: Path) -> None:
    done = export(load(str(vehicles_run)), "onnx", tmp_path / "deep" / "again.onnx")
    assert done.path.read_bytes() == exported.read_bytes()


def test_an_error_above_the_tolerance_is_refused_and_leaves_no_file(vehicles_run: Path, tmp_path: Path) -> None:
    place = tmp_path / "new" / "model.onnx"
    with raises(RunError, match=r"logits differ from torch's by \S+, which is \S+ of the greatest logit"):
        export(load(str(vehicles_run)), "onnx", place, tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


class _OfTwo(nn.Module):
    """Gives three logits, with a factor that depends on the number of images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] * (2 if len(images) == 2 else 1)


class _Branching(nn.Module):
    """Gives three logits, with a factor that depends on the pixels in a way that no graph can hold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] * (2 if images.sum() > 0 else 1)


class _Drifting(nn.Module):
    """Gives other logits each time, as a network with random parts does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] + torch.randn(1)


@mark.parametrize(
    ("network", "reason"),
    [
        (_OfTwo(), "the network binds its images to a batch of 2: expected any size"),
        (_Branching(), "torch cannot export the network: Could not guard on data-dependent expression"),
        (_Drifting(), "ONNX Runtime's logits differ from torch's"),
    ],
    ids=["of-two", "branching", "drifting"],
)
def test_a_network_that_no_file_can_hold_is_refused_in_a_line(
    network: nn.Module, reason: str, vehicles_run: Path, tmp_path: Path
) -> None:
    model = replace(load(str(vehicles_run)), model=network.eval())
    with raises(RunError) as refused:
        export(model, "onnx", tmp_path / "model.onnx")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_network_beyond_two_gib_is_refused_before_any_work(vehicles_run: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = nn.Linear(2**15, 2**14 + 1)
    with raises(RequestError, match=r"2\.1 GB of weights, and an ONNX file holds at most 2 GiB"):
        export(replace(load(str(vehicles_run)), model=network), "onnx", tmp_path / "model.onnx")


def test_a_model_of_the_hub_is_named_after_its_repository_and_keeps_its_licence(
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
def test_a_missing_package_is_said_with_its_extra(
    package: str, vehicles_run: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, exporting.__name__)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = command("export", vehicles_run)
    assert (code, out) == (2, "")
    assert err == f'error: {package} is not installed; pip install "resnext-hub[onnx]"\n'


def test_a_place_that_takes_no_file_exits_with_2(vehicles_run: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, part in (
        (tmp_path, f"--output {tmp_path} is a folder: expected a file"),
        (tmp_path / "file" / "model.onnx", f"cannot be made: {tmp_path / 'file'} is a file; choose another --output"),
    ):
        code, _, err = command("export", vehicles_run, "--output", place)
        assert code == 2
        assert part in err
    code, _, err = command("export", vehicles_run, "--format", "sparkle")
    assert code == 2
    assert "--format: sparkle is not one of onnx, openvino" in err
