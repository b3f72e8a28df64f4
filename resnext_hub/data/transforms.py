"""What is done to images: its configuration, timm's evaluation transform, and the part of it that a device does.

Mixing is not left to timm's Mixup, which pairs within the batch of one process: here the pairs and their parameters
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
from resnext_hub.errors import RequestError
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.saved_config import CROP, MAX_RESIZED, MAX_SIDE, MEAN, STD
from resnext_hub.settings import Range, check_fields, shown

Transform = Callable[[Image.Image], torch.Tensor]
"""Maps an image to a float32 tensor `(C, H, W)`."""


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Pillow's filters by timm's names."""


IMAGE_SIZE = MAX_SIDE
"""Greatest height and width in pixels, which a published model may state."""

_Probability = Annotated[float, Range(0, 1)]
_Mean = Annotated[float, Range(*MEAN)]
_Std = Annotated[float, Range(*STD)]
_Area = Annotated[float, Range(0, 1, above=True)]
_Ratio = Annotated[float, Range(0.01, 100)]
_Mixing = Annotated[float, Range(0, 100)]


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Size of the images and what is done to them; None takes the value of the model's pretrained_cfg."""

    image_size: Annotated[int, Range(1, IMAGE_SIZE)] | None = None
    """Height and width of the network's input in pixels."""
    crop_pct: Annotated[float, Range(*CROP)] | None = None
    """In evaluation, the part of the resized image that the centre crop keeps; above 1, the image gets a margin."""
    interpolation: str | None = None
    """Interpolation of resizing, such as bilinear or bicubic."""
    mean: tuple[_Mean, _Mean, _Mean] | None = None
    """Mean by which the channels are normalised, of pixels from 0 to 1."""
    std: tuple[_Std, _Std, _Std] | None = None
    """Standard deviation by which the channels are normalised, of pixels from 0 to 1."""
    scale: tuple[_Area, _Area] = (0.08, 1.0)
    """In training, least and greatest part of the image's area in a random crop."""
    ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)
    """In training, least and greatest width over height of a random crop."""
    hflip: _Probability = 0.5
    """In training, probability of mirroring left to right."""
    color_jitter: Annotated[float, Range(0, 10)] = 0.0
    """In training, greatest relative change of brightness, contrast and saturation."""
    auto_augment: str | None = None
    """In training, a policy in timm's notation, such as rand-m7-mstd0.5, augmix-m3 or 3a."""
    random_erasing: _Probability = 0.0
    """In training, probability of blanking a random rectangle."""
    mixup: _Mixing = 0.0
    """In training, blend pairs of images; alpha of the beta distribution of their shares, 0 for none."""
    cutmix: _Mixing = 0.0
    """In training, paste a rectangle of one image of a pair into the other; alpha, 0 for none; with both, either."""
    mix_prob: _Probability = 1.0
    """In training, probability that a pair is mixed, if mixup or cutmix is on."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise RequestError(
                f"--interpolation {shown(self.interpolation)}: expected one of {', '.join(INTERPOLATIONS)}"
            )
        if self.auto_augment is not None:
            check_policy(self.auto_augment)
        for flag, (low, high) in (("--scale", self.scale), ("--ratio", self.ratio)):
            if low > high:
                raise RequestError(f"{flag} {low:g} {high:g}: expected the smaller number first")

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed."""
        return (self.mixup > 0.0 or self.cutmix > 0.0) and self.mix_prob > 0.0


def resolve_input(config: TransformConfig, pretrained_cfg: Mapping[str, Any]) -> InputConfig:
    """Return the input of a model to be trained: the settings, and where they are open the model's `pretrained_cfg`."""
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
"""How many times a side is as long as the other in an image that is cropped before it is resized."""


def is_long(size: tuple[int, int]) -> bool:
    """Say whether resizing the shorter side of an image would make it far larger than what is kept of it."""
    return max(size) > LONG * min(size)


RESIZED_PIXELS = MAX_RESIZED**2
"""Most pixels to which a whole image is resized: 200 MB."""


class EvalTransform:
    """timm's evaluation transform: `(C, H, W)` float32, normalised, equal to timm's to the bit.

    Of a very long image, or at a large input size, timm resizes all and crops the centre: gigabytes for some pixels.
    Here the centre alone is computed of such an image, with pixels equal to timm's to rounding.

    Args:
        input: The images that the model takes.
    """

    def __init__(self, input: InputConfig) -> None:
        from timm.data import create_transform
        from torchvision.transforms import CenterCrop

        self.timms = create_transform(**input.to_timm(), is_training=False)
        self.resize, self.crop, *rest = self.timms.transforms
        self.rest = type(self.timms)(rest)
        self.crops = type(self.crop) is CenterCrop

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform an image.

        Raises:
            UnreadableImageError: If nothing is left of it at this size.
        """
        transformed: torch.Tensor
        if not self.is_costly(image.size):
            transformed = self.timms(image)
            return transformed
        height, width = self._resized(image)
        if min(height, width) < 1:
            raise UnreadableImageError(f"{image.width} x {image.height} pixels leave nothing at the model's size")
        if not self.crops:
            transformed = self.timms(image)
        else:
            kept = min(self.crop.size[0], height), min(self.crop.size[1], width)
            transformed = self.rest(self.crop(self._centre(image, (height, width), kept)))  # which pads what is small
        return transformed

    def is_costly(self, size: tuple[int, int]) -> bool:
        """Return whether resizing all of an image would take far more memory than what is kept of it."""
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

    def _centre(self, image: Image.Image, resized: tuple[int, int], kept: tuple[int, int]) -> Image.Image:
        """Return the centre that is kept `(rows, columns)` of the image at its resized height and width."""
        from torchvision.transforms.functional import pil_modes_mapping

        top, left = (round((whole - part) / 2.0) for whole, part in zip(resized, kept, strict=True))
        y, x = image.height / resized[0], image.width / resized[1]
        box = (left * x, top * y, (left + kept[1]) * x, (top + kept[0]) * y)
        return image.resize(kept[::-1], pil_modes_mapping[self.resize.interpolation], box=box)


class Mix(NamedTuple):
    """How the pairs of a batch are mixed, one entry per pair.

    `share` `(N/2,)` float32 is the part of an image's own pixels and label that stays; `boxes` `(N/2, 4)` int64 is
    top, bottom, left, right of what is exchanged, empty where the pair is blended or left alone.
    """

    share: torch.Tensor
    boxes: torch.Tensor


def draw_mix(config: TransformConfig, seed: int, step: int, pairs: range, size: tuple[int, int]) -> Mix:
    """Draw how pairs of a global batch are mixed, each from (seed, step, pair).

    Args:
        config: Which kinds of mixing there are.
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
    """Draw a rectangle around a uniform centre, of the part 1 - share of the area before the edges cut it off."""
    edges: list[int] = []
    for length in size:
        half = length * np.sqrt(1.0 - share) / 2.0
        centre = rng.uniform(0, length)
        edges += [max(round(centre - half), 0), min(round(centre + half), length)]
    return edges[0], edges[1], edges[2], edges[3]


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Turn pixels `(N, C, H, W)` uint8 into float32 by the arithmetic of timm's transforms, to the bit on a CPU.

    Args:
        images: The pixels.
        mean: Mean of values from 0 to 1, `(C, 1, 1)`.
        std: Standard deviation of such values, `(C, 1, 1)`.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous()  # no copy of what is channels last
    rows = pixels.to(torch.float32).div_(255).flatten(2)
    # over whole rows, as a CPU has no fast way to take three values in turn
    rows.sub_(mean.flatten().repeat(images.shape[3])).div_(std.flatten().repeat(images.shape[3]))
    return rows.view_as(pixels).permute(0, 3, 1, 2)


def erase(images: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Set a rectangle of each of normalised images `(N, C, H, W)` to zero, in place.

    Args:
        images: The images.
        edges: Top, bottom, left, right of the rectangles, `(N, 4)` int64; empty ones leave an image as it is.
    """
    return images.masked_fill_(_inside(edges, images), 0.0)


def _inside(edges: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Say which pixels of `images` `(N, C, H, W)` are within rectangles `(N, 4)`: `(N, 1, H, W)` bool."""
    top, bottom, left, right = (edge.view(-1, 1, 1, 1) for edge in edges.to(images.device).unbind(1))
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def mix_pairs(images: torch.Tensor, labels: torch.Tensor, mix: Mix, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix the images `(N, C, H, W)` 2j and 2j+1 with each other; give them and their targets `(N, classes)`."""
    share = mix.share.to(images.device).repeat_interleave(2)
    boxes = mix.boxes.to(images.device).repeat_interleave(2, dim=0)
    partner = torch.arange(len(images), device=images.device) ^ 1
    others = images[partner]
    cut = (boxes[:, 1] > boxes[:, 0]).view(-1, 1, 1, 1)
    own = share.view(-1, 1, 1, 1)
    blended = images * own + others * (1.0 - own)
    mixed = torch.where(cut, torch.where(_inside(boxes, images), others, images), blended)
    one_hot = torch.nn.functional.one_hot(labels, classes).to(images.dtype)
    targets = one_hot * share.view(-1, 1) + one_hot[partner] * (1.0 - share.view(-1, 1))
    return mixed, targets
