"""`resnext_hub.Classifier` loads models and classifies images of every kind that Python holds them in."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from pytest import MonkeyPatch, approx, fixture, importorskip, mark, raises
from support.processes import small_model

import resnext_hub
from resnext_hub import Classifier, RequestError, RunError
from resnext_hub.inference.optimize import OptimizedModel
from resnext_hub.inference.prediction import Prediction, Unread

NAMES = tuple(f"kind {index}" for index in range(1000))


@fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("classifier") / "model", label_names=NAMES)


@fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return resnext_hub.load(folder)


@fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


@fixture
def png(pixels: np.ndarray, tmp_path: Path) -> Path:
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_a_classifier_has_a_model_its_input_names_and_origin(classifier: Classifier, folder: Path) -> None:
    assert classifier.label_names == NAMES
    assert classifier.input.input_size == (3, 32, 32)
    assert (classifier.folder, classifier.revision) == (folder, None)
    assert not classifier.model.training


def test_a_folder_loads_by_string_path_and_prefix(classifier: Classifier, folder: Path) -> None:
    for where in (str(folder), folder, f"local-dir:{folder}"):
        state = resnext_hub.load(where).model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in classifier.model.state_dict().items())


def test_probabilities_are_the_softmax_of_the_models_logits(classifier: Classifier, pixels: np.ndarray) -> None:
    images = classifier.transform(Image.fromarray(pixels))[None].contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = classifier.model(images).double().softmax(1)
    found = classifier(pixels, batch_size=1)
    assert (found.dtype, found.shape, found.device.type) == (torch.float64, (1, 1000), "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # log_softmax is computed in float32
    assert found.sum() == approx(1, abs=1e-6)


def test_all_kinds_of_images_give_the_same_probabilities(classifier: Classifier, pixels: np.ndarray, png: Path) -> None:
    image = Image.fromarray(pixels)
    kinds = [png, str(png), png.read_bytes(), image, Image.open(png), pixels]
    expected = classifier(pixels)  # a single image is a batch of one
    for kind in kinds:
        assert torch.equal(classifier(kind), expected)
    found = classifier(kinds)
    assert found.shape == (len(kinds), 1000)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=0)  # another batch size


def test_grayscale_and_transparent_arrays_are_converted(classifier: Classifier, pixels: np.ndarray) -> None:
    gray = pixels[:, :, 0]
    alpha = np.dstack([pixels, np.full(gray.shape, 255, np.uint8)])
    for array, expected in ((gray[:, :, None], gray), (np.dstack([gray] * 3), gray), (alpha, pixels)):
        assert torch.equal(classifier(array), classifier(expected))


def test_no_images_give_no_rows(classifier: Classifier) -> None:
    assert classifier([]).shape == (0, 1000)
    assert classifier.predict([]) == []


def test_predictions_are_the_most_probable_classes_in_order(classifier: Classifier, pixels: np.ndarray) -> None:
    (found,) = classifier.predict(pixels, top=3, batch_size=1)
    assert isinstance(found, Prediction)
    assert found.image is pixels
    values, indices = classifier(pixels, batch_size=1)[0].topk(3)
    assert [guess.index for guess in found.guesses] == indices.tolist()
    assert [guess.label for guess in found.guesses] == [NAMES[index] for index in indices]
    assert [guess.probability for guess in found.guesses] == values.tolist()
    (found,) = resnext_hub.predict(classifier, pixels, top=5000)
    assert len(found.guesses) == 1000


def test_an_unreadable_image_is_reported_in_its_place(classifier: Classifier, png: Path, tmp_path: Path) -> None:
    cut_off = png.read_bytes()[:600]
    images = [png, tmp_path / "nowhere.png", b"text", Image.open(io.BytesIO(cut_off)), png]
    found = classifier.predict(images)
    assert [type(entry) for entry in found] == [Prediction, Unread, Unread, Unread, Prediction]
    assert [entry.reason for entry in found[1:3]] == ["the file does not exist", "not an image"]
    assert "truncated" in found[3].reason
    for index in (1, 2, 3):
        with raises(RequestError, match=r"^image 1 is unreadable: [^\n]+$"):
            classifier([png, images[index]])


@mark.parametrize(
    ("image", "part"),
    [
        (None, "image 1 is a NoneType: expected a path, encoded bytes, a PIL image or a uint8 array"),
        (5, "image 1 is a int: expected"),
        (torch.zeros(3, 32, 32), "image 1 is a Tensor: expected"),
        (np.zeros((3, 32, 32), np.uint8), r"an array of shape \(3, 32, 32\) and dtype uint8: expected \(H, W\)"),
        (np.zeros((32, 32, 3), np.float32), r"an array of shape \(32, 32, 3\) and dtype float32: expected"),
        (np.zeros((0, 32, 3), np.uint8), r"an array of shape \(0, 32, 3\)"),
    ],
)
def test_an_object_that_is_not_an_image_is_refused_by_its_position(
    classifier: Classifier, pixels: np.ndarray, image: Any, part: str
) -> None:
    for call in (classifier, classifier.predict, classifier.optimize):
        with raises(RequestError, match=part) as caught:
            call([pixels, image])
        assert "\n" not in str(caught.value)


@mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_classes_or_batch_size_is_refused(
    classifier: Classifier, pixels: np.ndarray, value: Any
) -> None:
    with raises(RequestError, match=r"^top(=.*)?: expected a whole number of at least 1"):
        classifier.predict(pixels, top=value)
    for call in (classifier, classifier.predict):
        with raises(RequestError, match=r"^batch_size(=.*)?: expected a whole number of at least 1"):
            call(pixels, batch_size=value)


def test_a_temperature_divides_the_logits(classifier: Classifier, pixels: np.ndarray) -> None:
    plain, calm = classifier(pixels)[0], replace(classifier, temperature=2.0)(pixels)[0]
    torch.testing.assert_close(calm, (plain.log() / 2).softmax(0), rtol=1e-4, atol=0)
    assert calm.argmax() == plain.argmax()


@mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, None, "2"])
def test_a_temperature_that_is_not_positive_is_refused(classifier: Classifier, value: Any) -> None:
    with raises(RequestError, match=r"temperature=.*: expected a positive number"):
        replace(classifier, temperature=value)


def test_an_optimized_classifier_predicts_the_same(classifier: Classifier, pixels: np.ndarray, png: Path) -> None:
    before = {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}
    fast = classifier.optimize([pixels, png], dtype=torch.float32, merge="off", compile=False)
    assert isinstance(fast.model, OptimizedModel)
    assert fast.model.report.relative_error < 1e-4
    assert (fast.label_names, fast.input, fast.folder) == (classifier.label_names, classifier.input, classifier.folder)
    torch.testing.assert_close(fast([pixels] * 5), classifier([pixels] * 5), rtol=1e-3, atol=1e-6)  # folded batch norms
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.model.state_dict().items())
    single = classifier.optimize(png, dtype=torch.float32, merge="off", compile=False)
    assert single.model.report.at_once == 1


def test_an_optimized_classifier_is_neither_optimized_again_nor_exported(
    classifier: Classifier, pixels: np.ndarray, tmp_path: Path
) -> None:
    fast = classifier.optimize(pixels, dtype=torch.float32, merge="off", compile=False)
    with raises(RequestError, match="already compiled: expected the original model"):
        fast.optimize(pixels)
    with raises(RequestError, match="an optimized model cannot be exported; export the original classifier"):
        fast.export("onnx", tmp_path / "model.onnx")
    with raises(RequestError, match="at least one image"):
        classifier.optimize([])


def test_a_classifier_exports_a_file_with_the_same_logits(
    classifier: Classifier, pixels: np.ndarray, tmp_path: Path
) -> None:
    onnxruntime = importorskip("onnxruntime")
    done = classifier.export("onnx", str(tmp_path / "model.onnx"), raw=True)
    assert done.path == tmp_path / "model.onnx"
    image = classifier.transform(Image.fromarray(pixels))[None]
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": image.numpy()})
    found = torch.from_numpy(logits).double().softmax(1)
    torch.testing.assert_close(found, classifier(pixels), rtol=1e-3, atol=1e-6)  # another runtime, in float32


def test_an_unknown_export_format_is_refused(classifier: Classifier) -> None:
    with raises(RequestError, match=r"^format=coreml: expected onnx, openvino or torch"):
        classifier.export("coreml")


@mark.parametrize(
    ("call", "part"),
    [
        (lambda path: resnext_hub.load(path / "nowhere"), "nowhere is not a trained model: expected the folder of"),
        (lambda path: resnext_hub.load(path), "is not a trained model: expected the folder of a finished run"),
        (lambda path: resnext_hub.load(None), "where=None: expected a folder, hf-hub:owner/name or a model name"),
        (lambda path: resnext_hub.load("resnext_g8"), "resnext_g8 has no released weights"),
        (lambda path: resnext_hub.load("hf-hub:a/b/c"), "is not a Hub ID of the form owner/name"),
        (lambda path: resnext_hub.from_hub("model"), "model"),
    ],
)
def test_a_model_that_is_not_there_is_refused(call: Callable[[Path], Any], part: str, tmp_path: Path) -> None:
    with raises((RequestError, RunError), match=part) as caught:
        call(tmp_path)
    assert str(caught.value).isprintable()


def test_a_model_without_classes_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    with raises(RequestError, match="has no classes and returns features; expected a classifier"):
        resnext_hub.load(small_model(tmp_path / "model", model, num_classes=0))


def test_a_repository_in_the_cache_loads_without_the_hub(
    classifier: Classifier, folder: Path, pixels: np.ndarray, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--small"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = resnext_hub.from_hub("me/small", verify=False)
    assert (found.revision, found.folder) == (commit, None)
    assert torch.equal(found(pixels), classifier(pixels))
    with raises(
        RunError, match=r"me/small could not be loaded from the Hub: .*; use verify=False to load a cached copy"
    ):
        resnext_hub.from_hub("me/small")


def test_a_classifier_of_grayscale_images_takes_color_images(tmp_path: Path, pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1)
    cfg = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.25]}
    gray = resnext_hub.load(small_model(tmp_path / "gray", model, pretrained_cfg=cfg, model_args={"in_chans": 1}))
    assert gray.input.mode == "L"
    image = Image.fromarray(pixels)
    assert torch.equal(gray(image), gray(image.convert("L")))
    assert gray.transform(image.convert("L")).shape == (1, 32, 32)
