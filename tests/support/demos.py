"""Models and images of the tests of pages."""

import io
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from support.processes import small_model

NAMES = ["<img src=x onerror=document.title='broken'>", "猫 & {{ 7 * 7 }}", "dog"]


def model(folder: Path, **config: object) -> Path:
    """Write a model of three classes, whose probabilities differ."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    with torch.no_grad():
        network.get_classifier().weight.mul_(4)
    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.9}
    return small_model(folder, network, num_classes=3, label_names=NAMES, pretrained_cfg=cfg, **config)


def photo(kind: str = "JPEG", orientation: int = 1, side: int = 90) -> bytes:
    generator = np.random.default_rng(orientation)
    small = Image.fromarray(generator.integers(0, 255, (6, 8, 3), np.uint8))
    image, exif, file = small.resize((side, side * 2 // 3), Image.Resampling.BICUBIC), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif)
    return file.getvalue()
