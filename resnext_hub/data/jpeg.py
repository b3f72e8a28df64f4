"""The fast decoder: decode and resize a rectangle of a JPEG, with pixels close to Pillow's.

simplejpeg (libjpeg-turbo) decodes, at 1/2, 1/4 or 1/8 of the size if that leaves enough pixels; torch resizes with
Pillow's filters, but vectorized. Pillow reads all but the simplest headers and decodes what simplejpeg rejects, so both
decoders agree on orientation and on which images are unreadable.
"""

import dataclasses
import importlib.util
import itertools
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from resnext_hub.data.bounds import MAX_PARTS, segments
from resnext_hub.data.decode import (
    MAX_IMAGE_PIXELS,
    decode,
    opened,
    orientation,
    read_bytes,
    require_parts,
    require_scans,
    require_size,
    within_memory,
)
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.models.input_config import InputConfig

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Interpolations that the fast decoder supports; Pillow handles the others."""

_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
"""By EXIF orientation: whether to transpose, then whether to flip the rows, and whether to flip the columns."""


_MARGIN = 8
"""Additional rows, at the decoded size, that are decoded below the rectangle."""

_USUAL = frozenset({0xE0, 0xDB, 0xC4, 0xDD, 0xFE})
"""Markers of JFIF, quantization tables, Huffman tables, restart intervals and comments."""

_APPLICATION = range(0xE0, 0xF0)
"""Markers of application segments."""


class Rectangle(NamedTuple):
    """A rectangle of an image, in pixels of the upright original."""

    top: int
    left: int
    height: int
    width: int


def is_installed() -> bool:
    """Return whether simplejpeg is installed."""
    return importlib.util.find_spec("simplejpeg") is not None


@dataclass(frozen=True)
class Header:
    """Content of a JPEG header, as Pillow interprets it."""

    stored: tuple[int, int]
    """Height and width before the orientation is applied."""
    turn: tuple[bool, bool, bool]
    """Orientation, as in `_TURNS`."""
    rows_at: int | None = None
    """Offset of the height in the file, if the image is upright and its rows are stored sequentially."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width after the orientation is applied."""
        return self.stored[::-1] if self.turn[0] else self.stored


def read_header(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Header | None:
    """Return the header of an RGB or grayscale JPEG, None for any other image.

    Raises:
        UnreadableImageError: If Pillow cannot read it, or it demands more memory or time than any legitimate image
            needs.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    frame = _find_frame(data)
    rows_at = frame.offset if frame and frame.sequential else None
    if frame and frame.plain:
        height, width = frame.size
        require_size(width, height, max_pixels)
        require_parts(data)
        require_scans(data, height * width, max_pixels)
        return Header(frame.size, _TURNS[1], rows_at)
    with opened(data, max_pixels) as image:
        header = _pillows_header(image)
    if header is None or frame is None or header.stored != frame.size or header.turn != _TURNS[1]:
        return header
    return dataclasses.replace(header, rows_at=rows_at)


class _Frame(NamedTuple):
    """The frame header of a JPEG."""

    offset: int
    """Offset of the height in the file; the width follows."""
    size: tuple[int, int]
    """Height and width."""
    sequential: bool
    plain: bool
    """Whether Pillow has nothing to add: APP1 can hold an orientation, and Pillow decides on unknown markers."""


def _find_frame(data: bytes) -> _Frame | None:
    """Return the frame header of a simple JPEG, in a tenth of the time that Pillow takes, None for any other."""
    usual = True
    for marker, offset in itertools.islice(segments(data), MAX_PARTS):
        if marker in (0xC0, 0xC2) and offset + 8 <= len(data):  # 8 bits, height, width, one or three components
            height, width = data[offset + 3] << 8 | data[offset + 4], data[offset + 5] << 8 | data[offset + 6]
            plain = usual and data[offset + 2] == 8 and data[offset + 7] in (1, 3)
            plain = plain and height * width > 0
            return _Frame(offset + 3, (height, width), marker == 0xC0, plain)
        if marker not in _USUAL and marker not in _APPLICATION:
            return None
        usual = usual and marker in _USUAL
    return None


def _pillows_header(image: Image.Image) -> Header | None:
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    return Header((image.height, image.width), _TURNS.get(orientation(image), _TURNS[1]))


def reduction(part: tuple[int, int], size: tuple[int, int]) -> int:
    """Return the greatest factor by which the decoder can downscale and still cover the target size.

    Args:
        part: Height and width of the rectangle.
        size: Height and width that it is resized to.
    """
    return next((factor for factor in (8, 4, 2) if all(p >= factor * s for p, s in zip(part, size, strict=True))), 1)


def decode_part(
    data: bytes, header: Header, part: Rectangle, size: tuple[int, int], interpolation: str, mode: str
) -> torch.Tensor | None:
    """Decode a rectangle of a JPEG and resize it.

    Args:
        data: The JPEG.
        header: Its header.
        part: The rectangle.
        size: Height and width that it is resized to.
        interpolation: `bilinear` or `bicubic`.
        mode: `RGB`, or `L` for one channel.

    Returns:
        `(C, H, W)` uint8, channels last in memory; None if simplejpeg rejects the file.
    """
    import simplejpeg

    factor = reduction((part.height, part.width), size)
    rows, columns = header.stored
    # rows below the part need not be decoded, but for a few that affect its last rows through chroma upsampling
    needed = part.top + part.height + _MARGIN * factor
    cut = needed < rows and header.rows_at is not None and _is_one_scan(data)
    if cut:
        rows, data = needed, _with_rows(data, header, needed)
    height, width = ceil(rows / factor), ceil(columns / factor)
    colours = "RGB" if mode == "RGB" else "GRAY"
    try:
        # not strict if cut: libjpeg warns about the remaining rows, and strict mode makes warnings errors
        pixels = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width, strict=not cut)
    except ValueError:  # Pillow tolerates some of this damage, so it decides
        return None
    if pixels.shape[:2] != (height, width):
        return None
    swapped, rows_turned, columns_turned = header.turn
    if swapped:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if rows_turned else 1, :: -1 if columns_turned else 1]
    if factor == 1:
        own = pixels[part.top : part.top + part.height, part.left : part.left + part.width]
        return _resize(own if header.turn == _TURNS[1] else np.ascontiguousarray(own), size, interpolation)
    # downscaled sides are rounded up at the stored end, which is the beginning if the side is flipped
    (height, width), (all_rows, all_columns) = pixels.shape[:2], header.upright
    top = part.top / factor + (height - all_rows / factor if rows_turned else 0.0)
    left = part.left / factor + (width - all_columns / factor if columns_turned else 0.0)
    bottom, right = top + part.height / factor, left + part.width / factor
    own = np.ascontiguousarray(pixels[floor(top) : ceil(bottom), floor(left) : ceil(right)])
    # the edges lie between pixels, which only Pillow's box supports: rounding them would triple the mean error
    box = (left % 1, top % 1, min(right - floor(left), own.shape[1]), min(bottom - floor(top), own.shape[0]))
    small = Image.fromarray(own if mode == "RGB" else own[:, :, 0])
    return to_tensor(small.resize(size[::-1], RESAMPLING[interpolation], box=box))


def _is_one_scan(data: bytes) -> bool:
    """Return whether a JPEG has a single scan without markers in it, and ends with the end marker.

    If so, rows that are not decoded contain nothing for which Pillow would reject the file.
    """
    for marker, offset in itertools.islice(segments(data), MAX_PARTS):
        if marker == 0xDA:
            scan = np.frombuffer(data, np.uint8, offset=offset)
            following = scan[np.flatnonzero(scan[:-1] == 0xFF) + 1]  # 0xFF followed by zero is data, not a marker
            return data.endswith(b"\xff\xd9") and np.count_nonzero(following) == 1
    return False


def _with_rows(data: bytes, header: Header, rows: int) -> bytes:
    """Return a JPEG with another number of rows in its header."""
    assert header.rows_at is not None
    return data[: header.rows_at] + rows.to_bytes(2, "big") + data[header.rows_at + 2 :]


class FastTransform:
    """timm's evaluation transform with the fast decoder, for prediction: pixels are close to timm's, not equal.

    Args:
        input: Input specification of the model.
        max_pixels: Images with more pixels are unreadable.

    Raises:
        ModuleNotFoundError: If simplejpeg is not installed.
    """

    def __init__(self, input: InputConfig, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        from torchvision.transforms import Resize

        importlib.import_module("simplejpeg")
        self.whole = EvalTransform(input)
        self.max_pixels = max_pixels
        self.resize, self.crop, *_, self.normalize = self.whole.timm_transform.transforms
        self.mode = input.mode
        self.interpolation: str = input.interpolation
        self.fast = type(self.resize) is Resize and self.interpolation in RESAMPLING

    def __call__(self, row: dict[str, Any]) -> torch.Tensor:
        """Decode and transform an image to `(C, H, W)` float32, normalized.

        Raises:
            UnreadableImageError: If the image cannot be decoded.
        """
        data = read_bytes(row, self.max_pixels)
        with within_memory():
            pixels = None
            header = read_header(data, self.max_pixels) if self.fast else None
            if header is not None and not self.whole.is_costly(header.upright):
                part = Rectangle(0, 0, *header.upright)
                pixels = decode_part(data, header, part, self._resized(header.upright), self.interpolation, self.mode)
            if pixels is None:
                return self.whole(decode({"bytes": data, "path": None}, self.mode, self.max_pixels))
            normalized: torch.Tensor = self.normalize(self.crop(pixels).to(torch.float32).div(255))
            return normalized

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width to which torchvision resizes, by the shorter side or both."""
        if not isinstance(self.resize.size, int):
            height, width = self.resize.size
            return height, width
        shorter = min(size)
        height, width = (int(self.resize.size * side / shorter) for side in size)
        return height, width


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an image, `(C, H, W)` uint8, channels last in memory."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Return the image of pixels `(C, H, W)` uint8 with three channels or one."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy())


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize pixels `(H, W, C)` with torch's antialiased filters, which are Pillow's."""
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last, where torch is fast
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True, align_corners=False)[0]
