"""Grad-CAM: the regions of an image that contribute most to a class."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from pytest import MonkeyPatch, fixture, mark, raises
from sklearn.datasets import load_digits
from support.processes import small_model
from torch.nn import functional as F

from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import Classifier, load
from resnext_hub.inference.explain import explain
from resnext_hub.plots.overlay import draw_overlay, overlay_names

Command = Callable[..., tuple[int, str, str]]

SIZE, PATCH = 96, 12


def patched_digits(count: int, seed: int) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Return digits in gray, every second one with a red patch, and the top and left of where it is or would be."""
    digits, generator = load_digits().images, np.random.default_rng(seed)
    images, corners = [], []
    for index in range(count):
        digit = (digits[generator.integers(len(digits))] * 255 / 16).astype(np.uint8)
        image = np.array(Image.fromarray(digit).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"))
        top, left = map(int, generator.integers(0, SIZE - PATCH, 2))
        if index % 2:
            image[top : top + PATCH, left : left + PATCH] = (255, 60, 0)
        images.append(image)
        corners.append((top, left))
    return images, corners


@fixture(scope="module")
def finds_patches(tmp_path_factory: object) -> Classifier:
    """A classifier that tells images with a patch from those without."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    images, _ = patched_digits(400, seed=0)
    pixels = torch.tensor(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        chosen = torch.randint(0, len(images), (24,))
        loss = F.cross_entropy(model(pixels[chosen]), chosen % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cfg = {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    folder = tmp_path_factory.mktemp("patches") / "model"
    small_model(folder, model, num_classes=2, label_names=["none", "patch"], pretrained_cfg=cfg)
    return load(folder)


def test_a_planted_patch_is_in_the_hottest_tenth_of_its_heat_map(finds_patches: Classifier) -> None:
    images, corners = patched_digits(100, seed=1)
    probabilities = finds_patches(images)
    assert (probabilities.argmax(dim=1) == torch.arange(100) % 2).float().mean() > 0.97
    found = []
    for heat, (top, left) in zip(finds_patches.explain(images[1::2], "patch"), corners[1::2], strict=True):
        hottest = heat >= torch.quantile(heat, 0.9)
        found.append(bool(hottest[top : top + PATCH, left : left + PATCH].all()))
    assert len(found) == 50
    assert np.mean(found) >= 0.9


def test_at_the_last_feature_map_the_heat_is_the_sum_of_the_maps_weighted_by_the_classifier() -> None:
    # with average pooling and a linear classifier, the gradients are the weights (Selvaraju et al., 2017, section 3.1)
    model = timm.create_model("resnet18", num_classes=3).eval()
    pixels = Image.effect_noise((128, 128), 80).convert("RGB")
    found = classifier_of(model, 128)
    with torch.no_grad():
        features = model.forward_features(found.transform(pixels)[None])
        cam = (features * model.fc.weight[2].view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    expected = F.interpolate(cam.relu() if (cam > 0).any() else cam, (128, 128), mode="bilinear")[0, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert torch.allclose(found.explain(pixels, 2)[0], expected, atol=1e-4)


@mark.parametrize(
    ("name", "size"),
    [
        ("resnext_g32", 32),
        ("resnext29_g8_w64", 32),
        ("resnet18", 64),
        ("regnety_002", 128),
        ("convnext_atto", 128),
        ("efficientnet_lite0", 128),
        ("mobilenetv3_small_100", 64),
        ("densenet121", 64),
        ("selecsls42", 64),  # whose stages return several maps
    ],
)
def test_convolutional_models_of_timm_can_be_explained(name: str, size: int) -> None:
    torch.manual_seed(0)
    classifier = classifier_of(timm.create_model(name, num_classes=5).eval(), size)
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (size + 9, size, 3), dtype=np.uint8)) for _ in range(3)]
    heat = classifier.explain(noise, batch_size=2)
    assert heat.shape == (3, size, size)
    assert heat.dtype == torch.float32
    assert heat.amin(dim=(1, 2)).tolist() == [0, 0, 0]
    assert heat.amax(dim=(1, 2)).tolist() == [1, 1, 1]
    assert torch.equal(heat[:1], classifier.explain(noise[:1], batch_size=2)) or torch.allclose(
        heat[:1], classifier.explain(noise[:1], batch_size=2), atol=1e-4
    )


def test_images_of_one_channel_are_explained_and_drawn() -> None:
    torch.manual_seed(0)
    classifier = classifier_of(timm.create_model("resnet18", num_classes=5, in_chans=1).eval(), 64, channels=1)
    image = Image.effect_noise((80, 64), 90)
    (found,) = explain(classifier, [image])
    assert found.pixels.shape == (64, 64, 1)
    expected = np.asarray(image.crop((8, 0, 72, 64)))
    assert np.abs(found.pixels[:, :, 0].astype(int) - expected).max() <= 1
    assert draw_overlay(found.pixels, found.heat).mode == "RGB"


def classifier_of(model: torch.nn.Module, size: int, channels: int = 3) -> Classifier:
    from resnext_hub.models.input_config import InputConfig

    names = tuple(f"class {index}" for index in range(model.num_classes))
    half = (0.5,) * channels
    cfg = {"input_size": (channels, size, size), "crop_pct": 1.0, "mean": half, "std": half}
    return Classifier(model, InputConfig.resolve(cfg), names, None)


def test_what_cannot_be_explained_is_refused_by_name(finds_patches: Classifier) -> None:
    image = patched_digits(1, seed=2)[0][0]
    for label in ("cat", 2, -1, True, 0.5):
        with raises(RequestError, match=r"expected the name of a class, or its index from 0 to 1"):
            finds_patches.explain(image, label)
    with raises(RequestError, match="image 0 is unreadable: not an image"):
        finds_patches.explain(b"text")
    with raises(RequestError, match=r"VisionTransformer has features of shape .*convolutional model"):
        classifier_of(timm.create_model("test_vit", num_classes=5).eval(), 160).explain(image)
    fast = finds_patches.optimize([image], compile=False)
    with raises(RequestError, match="heat maps need the original model, not an optimized one"):
        fast.explain(image)


def test_overlays_show_the_image_where_it_is_cold_and_are_large_enough_to_look_at() -> None:
    pixels = np.full((40, 60, 3), 200, np.uint8)
    heat = np.zeros((40, 60), np.float32)
    heat[:20] = 1
    overlay = draw_overlay(pixels, heat)
    assert overlay.size == (360, 240)
    assert overlay.getpixel((180, 230)) == (200, 200, 200)
    red, green, _ = overlay.getpixel((180, 10))
    assert red > green + 50
    assert draw_overlay(np.full((300, 300, 1), 9, np.uint8), np.zeros((300, 300))).getpixel((0, 0)) == (9, 9, 9)


def test_overlays_have_different_names_whatever_the_images_are_called() -> None:
    paths = ["a/cat.jpg", "b/cat.jpg", "a/cat.png", "A/CAT.jpg", "cat.jpg", "/x/a-cat/y.png", "x\udce9\n/y.png"]
    paths.append(f"a/{'long' * 60}.png")
    names = list(overlay_names(map(Path, paths)))
    assert names[:6] == [
        "a-cat-heatmap.png",
        "b-cat-heatmap.png",
        "a-cat-heatmap-2.png",
        "A-CAT-heatmap-3.png",
        "cat-heatmap.png",
        "a-cat-y-heatmap.png",
    ]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(name.encode() and len(name) < 130 and "/" not in name for name in names)


def test_predict_writes_an_overlay_of_every_readable_image(
    vehicles_run: Path, command: Command, tmp_path: Path
) -> None:
    images = vehicles_run.parent / "vehicles" / "validation" / "car"
    code, out, err = command("predict", vehicles_run, images, "--explain", tmp_path / "why", "--threads", 1)
    assert code == 1
    assert "1 of 13 images could not be decoded" in err
    assert len(out.splitlines()) == 12  # the classes are printed as well
    overlays = sorted(path.name for path in (tmp_path / "why").iterdir())
    assert overlays == [f"car-{index:03d}-heatmap.png" for index in range(12)]
    with Image.open(tmp_path / "why" / overlays[0]) as overlay:
        assert min(overlay.size) >= 224


def test_a_wrong_folder_and_a_missing_package_are_reported_in_one_line_before_anything_is_written(
    vehicles_run: Path, command: Command, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    image = vehicles_run.parent / "vehicles" / "validation" / "car" / "000.png"
    for folder, text in (
        (tmp_path / "file", "is not a folder; choose another --explain"),
        (tmp_path / "no" / "where", "the parent folder does not exist; create it first"),
    ):
        code, out, err = command("predict", vehicles_run, image, "--explain", folder)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert text in err
    for name in ("captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now says that there is no such module
    code, out, err = command("predict", vehicles_run, image, "--explain", tmp_path / "why")
    assert (code, out) == (2, "")
    assert err == 'error: captum is not installed; pip install "resnext-hub[report]"\n'
    assert not (tmp_path / "why").exists()
