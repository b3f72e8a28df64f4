"""timm's training transform, from an encoded image to uint8 pixels.

timm draws every random number in its own order whichever decoder is used, so both decoders crop the same rectangle.
Pixels stay uint8: normalization, which is cheaper per batch, and random erasing, which follows it, run on the device.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch

from resnext_hub.data.decode import MAX_IMAGE_PIXELS, opened, read_bytes, upright, within_memory
from resnext_hub.data.jpeg import RESAMPLING, Rectangle, decode_part, read_header, to_image, to_tensor
from resnext_hub.data.transforms import TransformConfig
from resnext_hub.models.input_config import InputConfig


class Edges(NamedTuple):
    """A rectangle of pixels; bottom and right are exclusive, and equal edges make it empty."""

    top: int
    bottom: int
    left: int
    right: int


NOTHING = Edges(0, 0, 0, 0)


class Augmented(NamedTuple):
    """An image `(C, H, W)` uint8, and the part of it to erase after normalization."""

    image: torch.Tensor
    erased: Edges = NOTHING


class Augment(Protocol):
    """Maps an encoded image (`bytes` or a `path`) to an augmented one; raises UnreadableImageError."""

    def __call__(self, row: dict[str, Any], mirrored: bool = False) -> Augmented:
        """Augment an image; `mirrored` says whether an alternating flip mirrors it in this epoch."""
        ...


class Augmentation:
    """timm's training transform: random resized crop, flip, and the configured augmentations.

    Args:
        config: The augmentations.
        input: Input specification of the model.
        decoder: `pil`, the reference, or `simplejpeg`, which is faster and yields nearly the same pixels.
        max_pixels: Images with more pixels are unreadable.
    """

    def __init__(
        self,
        config: TransformConfig,
        input: InputConfig,
        decoder: str = "pil",
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        from timm.data import create_transform
        from timm.data.random_erasing import RandomErasing

        first, second, _ = create_transform(
            input_size=input.input_size,
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=0.0 if config.alternating_flip else config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=input.interpolation,
            mean=input.mean,
            std=input.std,
            normalize=False,
            separate=True,
        )
        self.crop, *self.flips = first.transforms
        self.colours = second if second.transforms else None
        self.erasing = RandomErasing(config.random_erasing, device="cpu") if config.random_erasing else None
        self.alternates = config.alternating_flip and config.hflip > 0
        self.mode = input.mode
        self.interpolation: str = input.interpolation
        self.fast = decoder == "simplejpeg" and self.interpolation in RESAMPLING
        self.max_pixels = max_pixels

    def __call__(self, row: dict[str, Any], mirrored: bool = False) -> Augmented:
        """Decode and augment an image, with random numbers from the global generators.

        Args:
            row: The encoded image.
            mirrored: Whether an alternating flip, if it is enabled, mirrors the image in this epoch.

        Raises:
            UnreadableImageError: If the image cannot be decoded.
        """
        with within_memory():
            pixels = self._cropped(read_bytes(row, self.max_pixels))
        for flip in self.flips:
            pixels = flip(pixels)
        if self.alternates and mirrored:
            pixels = pixels.flip(-1)
        if self.colours is not None:
            pixels = to_tensor(self.colours(to_image(pixels)))
        return Augmented(pixels, self._draw_erased(pixels))

    def _cropped(self, data: bytes) -> torch.Tensor:
        """Return a random crop of an image, resized to the input size."""
        from torchvision.transforms.functional import resized_crop

        header = read_header(data, self.max_pixels) if self.fast else None
        if header is not None:
            part = self._draw_part(*header.upright)
            pixels = decode_part(data, header, part, self.crop.size, self.interpolation, self.mode)
            if pixels is not None:
                return pixels
        with opened(data, self.max_pixels) as image:
            whole = upright(image, self.mode)
        if header is None:
            part = self._draw_part(whole.height, whole.width)
        return to_tensor(resized_crop(whole, *part, self.crop.size, self.crop.interpolation))

    def _draw_part(self, height: int, width: int) -> Rectangle:
        return Rectangle(*self.crop.get_params(_sized(height, width), self.crop.scale, self.crop.ratio))

    def _draw_erased(self, pixels: torch.Tensor) -> Edges:
        if self.erasing is None:
            return NOTHING
        recorder = _EraseRecorder(pixels.shape)
        self.erasing(recorder)
        return recorder.edges


@lru_cache(maxsize=64)
def _sized(height: int, width: int) -> torch.Tensor:
    """Return a placeholder for an image, of which timm reads only the size."""
    return torch.empty((1, height, width), device="meta")


class _EraseRecorder:
    """A stand-in for an image that records where timm's random erasing writes."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.edges = shape, NOTHING

    def size(self) -> torch.Size:
        """Return the shape, as `torch.Tensor.size` does."""
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], value: object) -> None:
        _, rows, columns = place
        self.edges = Edges(rows.start, rows.stop, columns.start, columns.stop)
