"""Models and images of the tests of pages."""

import io
import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from support.processes import small_model

from resnext_hub.inference.classifier import load
from resnext_hub.models.ood import OodScore, write_ood

NAMES = ["<img src=x onerror=document.title='broken'>", "猫 & {{ 7 * 7 }}", "dog"]


def model(folder: Path, **config: object) -> Path:
    """Write a model of three classes, whose probabilities differ."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    with torch.no_grad():
        network.get_classifier().weight.mul_(4)
    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.9}
    return small_model(folder, network, num_classes=3, label_names=NAMES, pretrained_cfg=cfg, **config)


def careful_model(folder: Path) -> Path:
    """Write a model that is unsure about `photo("PNG")`, and to which `photo("PNG", 5)` is unlike its images."""
    score = OodScore(
        mean=torch.zeros(96),
        directions=torch.zeros(1, 96),
        shrink=torch.zeros(1),
        centers=load(model(folder)).embed(photo("PNG")),
        standard=torch.tensor([0.0, 1.0, 0.0, 1e9, -5.0]),  # the logarithm of the squared distance, above -5
    )
    config = json.loads((folder / "config.json").read_text())
    accept = {"accept_thresholds": {"0.9": 0.0, "0.95": 0.44}}
    config["resnext_hub"] = config.get("resnext_hub", {}) | accept | {"ood_sha256": write_ood(score, folder)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def photo(kind: str = "JPEG", orientation: int = 1, side: int = 90) -> bytes:
    generator = np.random.default_rng(orientation)
    small = Image.fromarray(generator.integers(0, 255, (6, 8, 3), np.uint8))
    image, exif, file = small.resize((side, side * 2 // 3), Image.Resampling.BICUBIC), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif)
    return file.getvalue()
