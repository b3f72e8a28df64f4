"""Transform settings, timm's evaluation transform, and normalization, erasing and mixing on the device.

timm's Mixup is not used, because it pairs images within the batch of one process; here, pairs and their parameters
belong to the global batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.data.policies import check_policy
from resnext_hub.errors import RequestError, setting
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.saved_config import CROP, MAX_RESIZED, MAX_SIDE, MEAN, STD
from resnext_hub.settings import Range, check_fields, shown

Transform = Callable[[Image.Image], torch.Tensor]
"""Maps an image to a float32 tensor `(C, H, W)`."""


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""timm's names of Pillow's filters."""


IMAGE_SIZE = MAX_SIDE
"""Greatest height and width in pixels, also of a published model."""

_Probability = Annotated[float, Range(0, 1)]
_Mean = Annotated[float, Range(*MEAN)]
_Std = Annotated[float, Range(*STD)]
_Area = Annotated[float, Range(0, 1, above=True)]
_Ratio = Annotated[float, Range(0.01, 100)]
_Mixing = Annotated[float, Range(0, 100)]


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Image size and augmentation.

    None takes the value from the model's `pretrained_cfg`.
    """

    image_size: Annotated[int, Range(1, IMAGE_SIZE)] | None = None
    """Height and width of the model's input, in pixels; the model's own image size if not given."""
    crop_pct: Annotated[float, Range(*CROP)] | None = None
    """Evaluation: side of the center crop, as a fraction of the side of the resized image; above 1, the image is
    padded. The model's own value if not given."""
    interpolation: str | None = None
    """Interpolation for resizing, such as bilinear or bicubic; the model's own interpolation if not given."""
    mean: tuple[_Mean, _Mean, _Mean] | None = None
    """Per-channel mean for normalization, for pixels from 0 to 1; the model's own values if not given."""
    std: tuple[_Std, _Std, _Std] | None = None
    """Per-channel standard deviation for normalization, for pixels from 0 to 1; the model's own values if not given."""
    scale: tuple[_Area, _Area] = (0.08, 1.0)
    """Training: smallest and largest area of random crops, as fractions of the image area."""
    ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)
    """Training: smallest and largest aspect ratio (width / height) of random crops."""
    hflip: _Probability = 0.5
    """Training: probability of a horizontal flip, 0 to 1."""
    alternating_flip: bool = False
    """Training: flip each image in every other epoch, instead of at random (Jordan, 2024, arXiv 2404.00498); requires
    --hflip 0.5, or --hflip 0, which disables flipping."""
    color_jitter: Annotated[float, Range(0, 10)] = 0.0
    """Training: maximum relative change in brightness, contrast and saturation, such as 0.4; 0 disables it."""
    auto_augment: str | None = None
    """Training: augmentation policy in timm's notation, such as rand-m7-mstd0.5, augmix-m3 or 3a; none if not given."""
    random_erasing: _Probability = 0.0
    """Training: probability of erasing a random rectangle, 0 to 1."""
    mixup: _Mixing = 0.0
    """Training: alpha of mixup, such as 0.2; 0 disables it."""
    cutmix: _Mixing = 0.0
    """Training: alpha of CutMix, such as 1.0; 0 disables it. With mixup, one of the two is chosen at random for each
    pair of images."""
    mix_prob: _Probability = 1.0
    """Training: probability of mixing a pair of images, 0 to 1; only used with mixup or CutMix."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise RequestError(
                f"{setting('interpolation', shown(self.interpolation))}: expected one of {', '.join(INTERPOLATIONS)}"
            )
        if self.alternating_flip and self.hflip not in (0.0, 0.5):
            raise RequestError(
                f"{setting('alternating_flip', True)} flips each image in every other epoch, so it needs "
                f"{setting('hflip', 0.5)}, not {self.hflip:g}"
            )
        if self.auto_augment is not None:
            check_policy(self.auto_augment)
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise RequestError(f"{setting(name, f'{low:g} {high:g}')}: expected the smaller number first")

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed."""
        return (self.mixup > 0.0 or self.cutmix > 0.0) and self.mix_prob > 0.0


def resolve_input(config: TransformConfig, pretrained_cfg: Mapping[str, Any]) -> InputConfig:
    """Return the input specification of a model to train: the settings, else values of its `pretrained_cfg`."""
    channels = pretrained_cfg["input_size"][0]
    size = None if config.image_size is None else (channels, config.image_size, config.image_size)
    return InputConfig.resolve(
        pretrained_cfg,
        input_size=size,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
        mean=config.mean if config.mean is None or channels == 3 else config.mean[:1] * channels,
        std=config.std if config.std is None or channels == 3 else config.std[:1] * channels,
    )


LONG = 32
"""Ratio of the sides above which an image is cropped before it is resized."""


def is_long(size: tuple[int, int]) -> bool:
    """Return whether resizing an image by its shorter side would make it far larger than the center crop."""
    return max(size) > LONG * min(size)


RESIZED_PIXELS = MAX_RESIZED**2
"""Most pixels of a whole resized image: 200 MB."""


class EvalTransform:
    """timm's evaluation transform: `(C, H, W)` float32, normalized, bitwise equal to timm's.

    timm resizes the whole image before the center crop, which takes gigabytes for very elongated images or large input
    sizes. For these, only the center is computed, with pixels equal to timm's up to rounding.

    Args:
        input: Input specification of the model.
    """

    def __init__(self, input: InputConfig) -> None:
        from timm.data import create_transform
        from torchvision.transforms import CenterCrop

        self.timm_transform = create_transform(**input.to_timm(), is_training=False)
        self.resize, self.crop, *rest = self.timm_transform.transforms
        self.rest = type(self.timm_transform)(rest)
        self.is_center_crop = type(self.crop) is CenterCrop

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform an image.

        Raises:
            UnreadableImageError: If a side would be resized to zero pixels.
        """
        transformed: torch.Tensor
        if not self.is_costly(image.size):
            transformed = self.timm_transform(image)
            return transformed
        height, width = self._resized(image)
        if min(height, width) < 1:
            raise UnreadableImageError(
                f"{image.width} x {image.height} pixels would be resized to {width} x {height} for the model"
            )
        if not self.is_center_crop:
            transformed = self.timm_transform(image)
        else:
            kept = min(self.crop.size[0], height), min(self.crop.size[1], width)
            transformed = self.rest(self.crop(self._center(image, (height, width), kept)))  # crop pads small images
        return transformed

    def is_costly(self, size: tuple[int, int]) -> bool:
        """Return whether resizing the whole image would take far more memory than the center crop."""
        target = self.resize.size if isinstance(self.resize.size, int) else max(self.resize.size)
        return is_long(size) or target**2 * max(size) > RESIZED_PIXELS * min(size)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Return the height and width to which timm resizes an image."""
        if hasattr(self.resize, "get_params"):
            height, width = self.resize.get_params(image, self.resize.size, self.resize.longest)
        elif isinstance(self.resize.size, int):
            height, width = (int(self.resize.size * side / min(image.size)) for side in (image.height, image.width))
        else:
            height, width = self.resize.size
        return height, width

    def _center(self, image: Image.Image, resized: tuple[int, int], kept: tuple[int, int]) -> Image.Image:
        """Return the center `(rows, columns)` that is kept of the image at its resized height and width."""
        from torchvision.transforms.functional import pil_modes_mapping

        top, left = (round((whole - part) / 2.0) for whole, part in zip(resized, kept, strict=True))
        y, x = image.height / resized[0], image.width / resized[1]
        box = (left * x, top * y, (left + kept[1]) * x, (top + kept[0]) * y)
        return image.resize(kept[::-1], pil_modes_mapping[self.resize.interpolation], box=box)


class Mix(NamedTuple):
    """Mixing parameters of a batch, one entry per pair of images.

    `share` `(N/2,)` float32 is the weight of an image's own pixels and label; `boxes` `(N/2, 4)` int64 is top, bottom,
    left, right of the exchanged rectangle, empty if the pair is blended or not mixed.
    """

    share: torch.Tensor
    boxes: torch.Tensor


def draw_mix(config: TransformConfig, seed: int, step: int, pairs: range, size: tuple[int, int]) -> Mix:
    """Draw the mixing parameters of pairs of a global batch, each from (seed, step, pair).

    Args:
        config: The mixing settings.
        seed: Seed of the run.
        step: Optimizer step, from 0.
        pairs: Numbers of the pairs within the global batch: pair j is its places 2j and 2j+1.
        size: Height and width of the images.
    """
    shares, boxes = [], []
    for pair in pairs:
        rng = np.random.default_rng((seed, step, pair))
        share, box = 1.0, (0, 0, 0, 0)
        if rng.random() < config.mix_prob:
            cut = config.cutmix > 0.0 and (config.mixup == 0.0 or rng.random() < 0.5)
            alpha = config.cutmix if cut else config.mixup
            share = float(rng.beta(alpha, alpha))
            if cut:
                box = _draw_box(rng, share, size)
                share = 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / (size[0] * size[1])
        shares.append(share)
        boxes.append(box)
    return Mix(torch.tensor(shares, dtype=torch.float32), torch.tensor(boxes, dtype=torch.int64).view(-1, 4))


def _draw_box(rng: np.random.Generator, share: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw a rectangle with a uniform center that covers 1 - share of the area before it is clipped at the edges."""
    edges: list[int] = []
    for length in size:
        half = length * np.sqrt(1.0 - share) / 2.0
        centre = rng.uniform(0, length)
        edges += [max(round(centre - half), 0), min(round(centre + half), length)]
    return edges[0], edges[1], edges[2], edges[3]


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Normalize pixels `(N, C, H, W)` uint8 to float32, on a CPU bitwise equal to timm's transforms.

    Args:
        images: The pixels.
        mean: Mean of values from 0 to 1, `(C, 1, 1)`.
        std: Standard deviation of such values, `(C, 1, 1)`.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous()  # no copy if channels last
    rows = pixels.to(torch.float32).div_(255).flatten(2)
    # mean and std are repeated over whole rows, because broadcasting three values is slow on a CPU
    rows.sub_(mean.flatten().repeat(images.shape[3])).div_(std.flatten().repeat(images.shape[3]))
    return rows.view_as(pixels).permute(0, 3, 1, 2)


def erase(images: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Set a rectangle of each normalized image `(N, C, H, W)` to zero, in place.

    Args:
        images: The images.
        edges: Top, bottom, left, right of the rectangles, `(N, 4)` int64; empty ones leave an image unchanged.
    """
    return images.masked_fill_(_inside(edges, images), 0.0)


def _inside(edges: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return which pixels of `images` `(N, C, H, W)` are inside the rectangles `(N, 4)`: `(N, 1, H, W)` bool."""
    top, bottom, left, right = (edge.view(-1, 1, 1, 1) for edge in edges.to(images.device).unbind(1))
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def mix_pairs(images: torch.Tensor, labels: torch.Tensor, mix: Mix, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images `(N, C, H, W)` 2j and 2j+1 with each other; return them and their targets `(N, classes)`.

    Labels are classes, `(N,)`, or targets already.
    """
    share = mix.share.to(images.device).repeat_interleave(2)
    boxes = mix.boxes.to(images.device).repeat_interleave(2, dim=0)
    partner = torch.arange(len(images), device=images.device) ^ 1
    others = images[partner]
    cut = (boxes[:, 1] > boxes[:, 0]).view(-1, 1, 1, 1)
    own = share.view(-1, 1, 1, 1)
    blended = images * own + others * (1.0 - own)
    mixed = torch.where(cut, torch.where(_inside(boxes, images), others, images), blended)
    own_targets = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, classes).to(images.dtype)
    targets = own_targets * share.view(-1, 1) + own_targets[partner] * (1.0 - share.view(-1, 1))
    return mixed, targets
