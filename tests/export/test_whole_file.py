"""An exported file answers for images of any size and mode as timm's pipeline does."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from pytest import TempPathFactory, approx, fixture, importorskip, mark, raises, skip
from support.digit_pairs import write_pairs
from support.processes import ROOT, TINY, run_process
from support.runtimes import openvino_core

from resnext_hub.data.decode import upright
from resnext_hub.errors import RunError
from resnext_hub.export.preprocess import Preprocess
from resnext_hub.export.runtime import export
from resnext_hub.inference.classifier import load
from resnext_hub.models.input_config import InputConfig

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}

SIZES = ((1, 1), (1, 40), (40, 1), (3, 5), (8, 8), (16, 90), (90, 16), (20, 200), (200, 20), (31, 33))
SIZES += ((32, 32), (33, 31), (48, 64), (64, 48), (64, 64), (77, 120), (120, 77), (100, 300), (300, 100), (240, 320))
"""Heights and widths: enlarged, reduced and elongated images."""

MODES = ("RGB", "L", "RGBA", "P", "CMYK")


@fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@fixture(scope="module")
def digits_run(tmp_path_factory: TempPathFactory) -> Path:
    """A model that can tell digits, with a 32-pixel input."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    flags = (*TINY, "--image-size", 32, "--epochs", 3, "--batch-size", 64, "--lr", 0.01, "--crop-pct", 0.9)
    done = run_process("scripts/train.py", *flags, "--interpolation", "bicubic", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def images(count: int) -> list[Image.Image]:
    """Return digits and smooth noise in all sizes and modes."""
    from sklearn.datasets import load_digits

    digits, generator, found = load_digits().images, np.random.default_rng(0), []
    for index in range(count):
        height, width = SIZES[index % len(SIZES)]
        if index % 2:
            small = Image.fromarray((digits[index] * 15).astype(np.uint8)).convert("RGB")
        else:
            small = Image.fromarray(generator.integers(0, 256, (max(height // 6, 1), max(width // 6, 1), 3), np.uint8))
        found.append(small.resize((width, height), Image.Resampling.BICUBIC).convert(MODES[index // 4 % len(MODES)]))
    return found


@torch.inference_mode()
def with_timm(folder: Path, found: list[Image.Image]) -> np.ndarray:
    """Return the probabilities of stock timm's pipeline."""
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return np.concatenate([model(transform(image.convert("RGB"))[None]).softmax(dim=1).numpy() for image in found])


def opened(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function that runs a file as its user does, in float32, and returns all of its outputs."""
    if path.suffix == ".onnx":
        onnxruntime = importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(None, {"images": pixels})
    if path.suffix == ".xml":
        importorskip("openvino")
        compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda pixels: [np.array(value) for value in compiled({"images": pixels}).values()]
    program: Any = torch.export.load(path).module()
    return lambda pixels: [value.numpy() for value in program(torch.from_numpy(pixels.copy()))]


def agreement(path: Path, expected: np.ndarray, found: list[Image.Image]) -> tuple[int, float]:
    """Return how many images get the same class as expected, and the largest difference of a probability."""
    run = opened(path)
    same, error = 0, 0.0
    for image, wanted in zip(found, expected, strict=True):
        probabilities, label, embedding, _ = run(np.asarray(image.convert("RGB"))[None])
        assert probabilities.shape == (1, 10)
        assert label == probabilities.argmax()
        assert embedding.shape[0] == 1
        same += int(label[0] == wanted.argmax())
        error = max(error, float(np.abs(probabilities[0] - wanted).max()))
    return same, error


@mark.parametrize("format", FORMATS)
def test_a_file_answers_as_timms_pipeline_for_every_size_and_mode(
    format: Any, digits_run: Path, tmp_path: Path
) -> None:
    importorskip({"onnx": "onnxscript", "openvino": "openvino", "torch": "torch"}[format])
    done = export(load(str(digits_run)), format, tmp_path / f"model{FORMATS[format]}")
    assert done.probability_error is not None
    assert done.outputs == ("probabilities", "label", "embedding", "ood_score")
    found = images(100)
    assert agreement(done.path, with_timm(digits_run, found), found) == (100, approx(0, abs=0.01))
    run, expected = opened(done.path), load(str(digits_run)).predict([image.convert("RGB") for image in found])
    scores = [float(run(np.asarray(image.convert("RGB"))[None])[3][0]) for image in found]
    assert np.median(np.abs(np.subtract(scores, [prediction.ood_score for prediction in expected]))) < 0.01
    assert scores == approx([prediction.ood_score for prediction in expected], abs=0.1)


@mark.slow
@mark.parametrize("format", ["onnx", "openvino"])
def test_999_of_1000_images_get_the_class_of_timms_pipeline(format: Any, digits_run: Path, tmp_path: Path) -> None:
    importorskip({"onnx": "onnxscript", "openvino": "openvino"}[format])
    done = export(load(str(digits_run)), format, tmp_path / f"model{FORMATS[format]}")
    found = images(1000)
    same, error = agreement(done.path, with_timm(digits_run, found), found)
    assert same >= 999
    assert error <= 0.01


@mark.parametrize("mode", ["center", "squash", "border"])
@mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_pixels_are_those_of_timms_transform_up_to_rounding(mode: str, interpolation: str) -> None:
    generator = np.random.default_rng(0)
    for size, crop_pct in (((3, 32, 32), 0.875), ((3, 40, 28), 0.9), ((1, 28, 28), 1.0), ((3, 24, 24), 1.2)):
        channels = size[0]
        config = InputConfig(
            input_size=size,
            interpolation=interpolation,
            mean=(0.5, 0.4, 0.3)[:channels],
            std=(0.2, 0.3, 0.25)[:channels],
            crop_pct=crop_pct,
            crop_mode=mode,
        )
        transform = timm.data.create_transform(**config.to_timm(), is_training=False)
        level = 1 / (255 * min(config.std))
        for height, width in SIZES:
            if mode == "border" and min(height, width) == 1:
                continue  # timm would resize it to nothing
            pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
            expected = transform(upright(Image.fromarray(pixels), config.mode))
            found = Preprocess(config)(torch.from_numpy(pixels)[None])[0]
            # Pillow rounds sums that end in one half, as bilinear and box filters have, up or down, in both passes
            assert float((found - expected).abs().max()) <= 2.02 * level
            assert float(((found - expected).abs() > level / 2).float().mean()) < 0.12


def test_several_images_in_a_batch_get_the_answers_of_single_ones(digits_run: Path, tmp_path: Path) -> None:
    path = export(load(str(digits_run)), "torch", tmp_path / "model.pt2").path
    run = opened(path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 50, 70, 3), np.uint8)
    together = run(pixels)
    for index in range(5):
        alone = run(pixels[index : index + 1])
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], many[index], atol=1e-4)


def test_test_time_augmentation_and_temperature_are_in_the_file(digits_run: Path, tmp_path: Path) -> None:
    classifier = replace(load(str(digits_run)), tta="flip", temperature=3.0)
    done = export(classifier, "torch", tmp_path / "model.pt2")
    run = opened(done.path)
    for image in images(8):
        rgb = image.convert("RGB")
        probabilities, _, embedding, _ = run(np.asarray(rgb)[None])
        np.testing.assert_allclose(probabilities, classifier(rgb), atol=0.01)
        np.testing.assert_allclose(embedding, classifier.embed(rgb), atol=0.1)


def test_a_file_of_several_labels_says_which_reach_their_thresholds(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", {"train": 64, "validation": 60})
    words = (*TINY, "--image-size", 32, "--max-steps", 4, "--batch-size", 40, "--lr", 0.01)
    done = run_process("scripts/train.py", *words, "--dataset", tmp_path / "pairs", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    classifier = load(str(tmp_path / "run"))
    assert classifier.thresholds is not None
    exported = export(classifier, "torch", tmp_path / "model.pt2")
    assert exported.outputs == ("probabilities", "labels", "embedding")
    probabilities, labels, _ = opened(exported.path)(np.full((1, 40, 60, 3), 90, np.uint8))
    assert labels.dtype == bool
    assert (labels == (probabilities >= np.float32(classifier.thresholds))).all()


def test_a_file_of_torch_contains_no_local_path(digits_run: Path, tmp_path: Path) -> None:
    content = export(load(str(digits_run)), "torch", tmp_path / "model.pt2").path.read_bytes()
    for word in (str(ROOT), str(tmp_path), "site-packages"):
        assert word.encode() not in content, word


def test_int8_is_refused_for_torch(digits_run: Path, command: Any) -> None:
    code, _, err = command("export", digits_run, "--format", "torch", "--int8")
    assert (code, err) == (2, "error: --int8 needs --format onnx or --format openvino\n")


class _WrongPixels(Preprocess):
    """Preprocessing that forgets the mean."""

    def forward(self, found: torch.Tensor) -> torch.Tensor:
        return super().forward(found) + self.mean / self.std


def test_a_file_with_other_pixels_than_timms_is_not_written(digits_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("resnext_hub.export.parts.Preprocess", _WrongPixels)
    with raises(RunError, match=r"the probabilities of torch.export differ from those with timm's preprocessing by"):
        export(load(str(digits_run)), "torch", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


CPP = """
#include <cstdio>
#include <vector>
#include <openvino/openvino.hpp>
int main(int, char** argv) {
    size_t height = std::stoul(argv[1]), width = std::stoul(argv[2]);
    std::vector<uint8_t> bytes(height * width * 3);
    if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) return 1;
    uint8_t* pixels = bytes.data();
SNIPPET
    std::printf("%ld\\n", static_cast<long>(label));
}
"""


def snippet_of(language: str) -> str:
    text = (ROOT / "docs/how-to/export.md").read_text()
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@mark.slow
def test_the_cpp_snippet_of_the_docs_gives_the_label(digits_run: Path, tmp_path: Path) -> None:
    openvino = importorskip("openvino")
    root = Path(openvino.__file__).parent
    libraries = sorted((root / "libs").glob("libopenvino.so*"))
    if shutil.which("g++") is None or not (root / "include").is_dir() or not libraries:
        skip("needs g++ and OpenVINO's headers")
    export(load(str(digits_run)), "openvino", tmp_path / "model.xml")
    (tmp_path / "main.cpp").write_text(CPP.replace("SNIPPET", snippet_of("cpp")))
    words = ["g++", "-std=c++17", "main.cpp", "-o", "main", f"-I{root / 'include'}", str(libraries[-1])]
    subprocess.run([*words, f"-Wl,-rpath,{root / 'libs'}"], cwd=tmp_path, check=True, timeout=300)
    for image in images(6):
        pixels = np.asarray(image.convert("RGB"))
        words = ["./main", str(pixels.shape[0]), str(pixels.shape[1])]
        done = subprocess.run(words, cwd=tmp_path, input=pixels.tobytes(), capture_output=True, check=True)
        assert int(done.stdout) == with_timm(digits_run, [image]).argmax()


JAVASCRIPT = """
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const fs = require("fs");
const [height, width] = process.argv.slice(2).map(Number);
const bytes = fs.readFileSync(0);
const canvas = {width, height};
const context = {getImageData: () => ({data: new Uint8ClampedArray(bytes), width, height})};
(async () => {
SNIPPET
    console.log(Number(label.data[0]));
})();
"""


@mark.slow
def test_the_javascript_snippet_of_the_docs_gives_the_label(digits_run: Path, tmp_path: Path) -> None:
    importorskip("onnxscript")
    if shutil.which("npm") is None:
        skip("needs npm")
    words = ["npm", "install", "--silent", "--no-audit", "--no-fund", "onnxruntime-web"]
    if subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=300).returncode:
        skip("onnxruntime-web cannot be installed")
    export(load(str(digits_run)), "onnx", tmp_path / "model.onnx")
    (tmp_path / "main.js").write_text(JAVASCRIPT.replace("SNIPPET", snippet_of("javascript")))
    for image in images(4):
        pixels = np.asarray(image.convert("RGB").convert("RGBA"))
        words = ["node", "main.js", str(pixels.shape[0]), str(pixels.shape[1])]
        done = subprocess.run(words, cwd=tmp_path, input=pixels.tobytes(), capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert int(done.stdout) == with_timm(digits_run, [image]).argmax()
