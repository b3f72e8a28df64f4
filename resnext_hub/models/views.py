"""Test-time augmentation: logits of an image and of its mirror image, of which the mean is the prediction."""

from typing import Any, Literal, get_args

import torch
from torch import nn

TestTimeAugmentation = Literal["none", "flip"]
"""`none` predicts from the image alone; `flip` from the mean of the logits of the image and its mirror image."""

TEST_TIME_AUGMENTATIONS: tuple[str, ...] = get_args(TestTimeAugmentation)


def predict_views(model: nn.Module, images: torch.Tensor, tta: TestTimeAugmentation) -> torch.Tensor:
    """Return the logits of each view of images, `(views, N, classes)` float32, the images themselves first.

    The mean over the views is the prediction: logits are averaged, as in timm, not probabilities, so that a temperature
    and a threshold apply to it as to a single view. With one view it is that view, bit for bit.

    Args:
        model: The model, in evaluation mode.
        images: Transformed images on its device, `(N, C, H, W)`; the flip is of these.
        tta: The test-time augmentation.
    """
    return torch.stack([model(view).float() for view in views_of(images, tta)])


def views_of(images: torch.Tensor, tta: TestTimeAugmentation) -> list[torch.Tensor]:
    """Return the views of images `(N, C, H, W)`, the images themselves first."""
    views = [images] if tta == "none" else [images, images.flip(-1)]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def logits_and_features(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits `(N, classes)` of images and their features `(N, F)`, both float32, from one forward pass.

    Args:
        model: A model of timm, in evaluation mode.
        images: Transformed images on its device, `(N, C, H, W)`.
    """
    maps = model.forward_features(images)
    features: torch.Tensor = model.forward_head(maps, pre_logits=True)
    return model.forward_head(maps).float(), features.float().flatten(1)
