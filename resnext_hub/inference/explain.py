"""Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391): the regions of an image that contribute most to a class."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.errors import RequestError, setting
from resnext_hub.inference.inputs import ImageInput
from resnext_hub.inference.prediction import compute_rows
from resnext_hub.settings import shown

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier

SMALLEST_MAP = 4
"""Least height and width of the feature map that is used: the last one has a single cell if images are as small as the
stride of the model, and so would mark the whole image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """An image as the model sees it, and how much each region of it contributes to a class."""

    pixels: np.ndarray
    """The image after resizing and cropping, `(H, W, C)` uint8."""
    heat: np.ndarray
    """`(H, W)` float32, from 0 for the region that contributes least to 1 for the one that contributes most."""


def explain(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    *,
    label: int | str | None = None,
    batch_size: int = 32,
    device: torch.device | None = None,
    decoder: str = "pil",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[Explanation | str]:
    """Return an iterator over the heat maps of images by Grad-CAM, or the reason if an image is unreadable.

    The feature map is the last one of at least 4 x 4 cells.

    Args:
        classifier: The classifier; its model is moved to the device.
        images: The images, as for `predict`.
        label: The class to explain, by name or index; the most probable one of each image if not given.
        batch_size: Batch size of the forward passes.
        device: Device to compute on; the accelerator by default, if there is one.
        decoder: `pil` or `simplejpeg`.
        max_pixels: An image with more pixels is unreadable.

    Raises:
        RequestError: If an argument is invalid, or the model was optimized or has no feature maps.
        ModuleNotFoundError: If captum is not installed.
    """
    import captum.attr  # noqa: F401 - reported here, rather than in the middle of the images

    if not hasattr(classifier.model, "forward_head"):
        raise RequestError(
            "heat maps need the original model, not an optimized one; use the classifier that `optimize` was called on"
        )
    model = _WithMaps(classifier.model.cpu())
    with torch.inference_mode():  # refuses a model without feature maps, before the first image
        model(torch.zeros(1, *classifier.input.input_size))
    compute = partial(_heat_and_inputs, _class_index(label, classifier.label_names))
    rows = compute_rows(
        classifier, images, compute, batch_size=batch_size, device=device, decoder=decoder, max_pixels=max_pixels
    )
    input = classifier.input
    return (row if isinstance(row, str) else _explanation(row.numpy(), input.mean, input.std) for row in rows)


def _explanation(row: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Explanation:
    pixels = row[1:].transpose(1, 2, 0) * np.array(std) + np.array(mean)
    return Explanation(pixels=(255 * pixels).round().clip(0, 255).astype(np.uint8), heat=row[0])


def _class_index(label: int | str | None, names: Sequence[str]) -> int | None:
    """Return the index of a class by its name or index."""
    if label is None:
        return None
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise RequestError(
        f"{setting('label', shown(repr(label)))}: expected the name of a class, or its index from 0 to {len(names) - 1}"
    )


def _heat_and_inputs(label: int | None, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the heat map of each image followed by its channels, `(N, 1 + C, H, W)`."""
    with torch.inference_mode(False), torch.enable_grad():  # the callers of this function need no gradients
        inputs = images.clone().requires_grad_()  # of a tensor made in inference mode, autograd keeps nothing
        heat = _grad_cam(model, inputs, label).detach()
    return torch.cat([heat, images], dim=1)


def _grad_cam(model: nn.Module, images: torch.Tensor, label: int | None) -> torch.Tensor:
    """Return heat maps `(N, 1, H, W)`, 0 to 1."""
    from captum.attr import LayerAttribution, LayerGradCam

    wrapped = _WithMaps(model)
    layer, logits = wrapped.observe(images)
    target = logits.argmax(dim=1) if label is None else label
    cam = LayerGradCam(wrapped, layer)
    maps: torch.Tensor = cam.attribute(images, target=target)
    positive = (maps > 0).any(dim=(2, 3), keepdim=True)
    maps = torch.where(positive, maps.relu(), maps)  # without any, the least negative ones
    maps = LayerAttribution.interpolate(maps, tuple(images.shape[2:]), "bilinear")
    maps = maps - maps.amin(dim=(2, 3), keepdim=True)
    return maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


class _WithMaps(nn.Module):
    """A timm model whose last feature map passes through a module, so that it can be observed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.maps = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of images.

        Raises:
            RequestError: If the features of the model are not feature maps.
        """
        features = self.model.forward_features(images)
        if features.ndim != 4 or features.shape[1] != self.model.num_features:
            raise RequestError(
                f"{type(self.model).__name__} has features of shape {tuple(features.shape)}; Grad-CAM needs those of a "
                f"convolutional model, (N, {self.model.num_features}, H, W)"
            )
        logits: torch.Tensor = self.model.forward_head(self.maps(features))
        return logits

    @torch.no_grad()
    def observe(self, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
        """Return the module whose output is the last feature map with enough cells, and the logits of the images."""
        modules = dict(self.model.named_modules())
        names = [info["module"] for info in getattr(self.model, "feature_info", ())]
        stages = [modules[name] for name in names if name in modules]  # some models name modules that do not exist
        sides: dict[nn.Module, int] = {}

        def note(module: nn.Module, _: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4:  # some models pass on several maps at once
                sides[module] = min(output.shape[2:])

        hooks = [module.register_forward_hook(note) for module in (*stages, self.maps)]
        logits = self(images)
        for hook in hooks:
            hook.remove()
        large = [module for module in (*stages, self.maps) if sides.get(module, 0) >= SMALLEST_MAP]
        return large[-1] if large else self.maps, logits
