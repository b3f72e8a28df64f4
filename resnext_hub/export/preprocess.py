"""timm's evaluation transform as a module of tensor operations, so that an exported file contains it.

Pillow resizes in two passes, one for each axis, and each rounds to 8 bits. A pass is a linear map along one axis, so it
is a matrix product here. Its matrix is computed from the size of the image, for the rows and columns of the center crop
alone. The operations exist in every runtime, and dimensions can be dynamic.
"""

import math

import torch
from torch import nn

from resnext_hub.models.input_config import InputConfig

_GRAY = (19595, 38470, 7471)
"""Weights of red, green and blue in Pillow's conversion to grayscale, in units of 2^-16."""


class Preprocess(nn.Module):
    """Maps RGB images `(N, H, W, 3)` uint8 of any size to a model's input `(N, C, height, width)` float32.

    Equal to timm's evaluation transform with Pillow 13, except that a pixel may differ by one gray level, rarely two,
    where a weighted sum ends in one half up to rounding, and that interpolation `nearest` may take the other of two
    pixels at equal distances.

    Args:
        input: Input of the model.
    """

    mean: torch.Tensor
    std: torch.Tensor
    fill: torch.Tensor

    def __init__(self, input: InputConfig) -> None:
        super().__init__()
        self.gray = input.channels == 1
        self.filter = input.interpolation
        self.mode = input.crop_mode if input.crop_mode in ("squash", "border") else "center"
        self.crop = input.input_size[1:]
        self.resized = [math.floor(side / input.crop_pct) for side in self.crop]
        shape = (1, input.channels, 1, 1)
        padding = [round(255 * value) if self.mode == "border" else 0 for value in input.mean]
        self.register_buffer("fill", torch.tensor(padding, dtype=torch.float32).view(shape))
        self.register_buffer("mean", torch.tensor(input.mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(input.std, dtype=torch.float32).view(shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `(N, H, W, 3)` uint8 to `(N, C, height, width)` float32."""
        pixels = images.permute(0, 3, 1, 2)
        if self.gray:
            red, green, blue = (pixels[:, channel : channel + 1].long() * _GRAY[channel] for channel in range(3))
            pixels = (red + green + blue + (1 << 15)) >> 16
        pixels = pixels.float()
        sides = [torch.scalar_tensor(side, dtype=torch.float64) for side in images.shape[1:3]]
        sizes = self._sizes(*sides)
        rows, columns = (
            resize_matrix(self.filter, side, size, crop, torch.arange(length))
            for side, size, crop, length in zip(sides, sizes, self.crop, images.shape[1:3], strict=True)
        )
        # Pillow 13 starts with the rows if the height shrinks by more than twice as many pixels as the width
        shrinks = sides[0] - sizes[0]
        # both orders are computed, because OpenVINO returns random values from the first run of a branch
        found = torch.where(
            (shrinks > 0) & (shrinks > 2 * (sides[1] - sizes[1])),
            _to_bytes(_to_bytes(rows @ pixels) @ columns.T),
            _to_bytes(rows @ _to_bytes(pixels @ columns.T)),
        )
        outside = 1 - rows.sum(dim=1).view(-1, 1) * columns.sum(dim=1)
        found = found + outside.round() * self.fill
        normalized: torch.Tensor = (found / 255 - self.mean) / self.std
        return normalized

    def _sizes(self, height: torch.Tensor, width: torch.Tensor) -> list[torch.Tensor]:
        """Return height and width of the whole resized image."""
        if self.mode == "squash":
            return [torch.scalar_tensor(side, dtype=torch.float64) for side in self.resized]
        if self.mode == "center" and self.resized[0] == self.resized[1]:
            short = torch.minimum(height, width)
            return [(self.resized[0] * side / short).floor() for side in (height, width)]
        ratios = height / self.resized[0], width / self.resized[1]
        ratio = torch.maximum(*ratios) if self.mode == "border" else torch.minimum(*ratios)
        return [(side / ratio).round().clamp(min=1.0) for side in (height, width)]


def resize_matrix(
    filter: str, side: torch.Tensor, size: torch.Tensor, crop: int, positions: torch.Tensor
) -> torch.Tensor:
    """Return the matrix that resizes an axis and crops its center, `(crop, side)` float32.

    A row outside of the resized image is zero.

    Args:
        filter: Pillow's filter, by timm's name.
        side: Pixels before resizing, a float64 scalar.
        size: Pixels after resizing, a float64 scalar.
        crop: Pixels after cropping.
        positions: The indices of the pixels before resizing, `(side,)`.
    """
    # torchvision pads an image that is smaller than the crop before it crops
    difference = size - crop
    offset = torch.where(difference >= 0, (difference / 2).round(), -((-difference / 2).floor()))
    targets = torch.arange(crop, dtype=torch.float64).view(-1, 1) + offset
    scale = side / size
    center = (targets + 0.5) * scale
    sources = positions.to(torch.float64)
    if filter == "nearest":
        weights = (center.floor() == sources).to(torch.float64)
    else:
        shrinking = scale.clamp(min=1.0)
        weights = _FILTERS[filter]((sources - center + 0.5) * (1 / shrinking))
        if filter == "box":  # the other filters are zero at the edges of this window
            first, end = ((center + edge * shrinking + 0.5).floor() for edge in (-0.5, 0.5))
            weights = torch.where((sources >= first) & (sources < end), weights, 0.0)
        weights = weights / weights.sum(dim=1, keepdim=True)
    inside = (targets >= 0) & (targets < size)
    return torch.where(inside, weights, 0.0).to(torch.float32)


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Round to whole gray levels as Pillow does, half up, and clip."""
    return (values + 0.5).floor().clamp(0, 255)


def _box(x: torch.Tensor) -> torch.Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


def _hamming(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 1, _sinc(x) * (0.54 + 0.46 * torch.cos(x * math.pi)), 0.0)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Return Keys' kernel with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 3, _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: torch.Tensor) -> torch.Tensor:
    angle = x * math.pi
    return torch.where(angle == 0, 1.0, torch.sin(angle) / torch.where(angle == 0, 1.0, angle))


_FILTERS = {"box": _box, "bilinear": _triangle, "hamming": _hamming, "bicubic": _bicubic, "lanczos": _lanczos}
