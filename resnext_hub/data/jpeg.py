"""The fast decoder: a rectangle of a JPEG, resized, with pixels like those of Pillow.

simplejpeg (libjpeg-turbo) decodes, at a half, a quarter or an eighth of the size where that leaves enough pixels; torch
resizes by the filters of Pillow, with the vector instructions that Pillow does not use. Pillow reads every header but
the plainest and decodes what simplejpeg refuses, so that orientation and what is unreadable are its judgement.
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
"""Interpolations of the fast decoder; the others are Pillow's alone."""

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
"""By EXIF orientation: whether rows and columns change places; then, whether rows and whether columns turn round."""


_MARGIN = 8
"""Rows, of the decoded size, that are decoded below what is needed."""

_USUAL = frozenset({0xE0, 0xDB, 0xC4, 0xDD, 0xFE})
"""Markers of JFIF, quantisation, Huffman codes, restarts and comments."""

_APPLICATION = range(0xE0, 0xF0)
"""Markers of what programs have to say."""


class Rectangle(NamedTuple):
    """A part of an image in pixels of the upright original."""

    top: int
    left: int
    height: int
    width: int


def is_installed() -> bool:
    """Say whether the fast decoder can be used."""
    return importlib.util.find_spec("simplejpeg") is not None


@dataclass(frozen=True)
class Header:
    """What the header of a JPEG says, as Pillow reads it."""

    stored: tuple[int, int]
    """Height and width of the pixels as they are stored."""
    turn: tuple[bool, bool, bool]
    """As in `_TURNS`."""
    rows_at: int | None = None
    """Place of the height in the file, if its rows are upright and stored in their order."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width of the image as it is shown."""
        return self.stored[::-1] if self.turn[0] else self.stored


def read_header(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Header | None:
    """Return the header of an image; None for what is no JPEG in colour or grey.

    Raises:
        UnreadableImageError: If Pillow does not read it, or it asks for more memory or time than an image needs.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    frame = _find_frame(data)
    rows_at = frame.place if frame and frame.sequential else None
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
    """What stands in a JPEG's frame header, and where."""

    place: int
    """Of its height, in the file; the width follows."""
    size: tuple[int, int]
    """Height and width."""
    sequential: bool
    plain: bool
    """Whether the file cannot mean more: APP1 can hold an orientation, and anything unknown is Pillow's to judge."""


def _find_frame(data: bytes) -> _Frame | None:
    """Find the frame header of a JPEG, in a tenth of the time that Pillow takes for it; None where that is not easy."""
    usual = True
    for marker, place in itertools.islice(segments(data), MAX_PARTS):
        if marker in (0xC0, 0xC2) and place + 8 <= len(data):  # 8 bits, height, width, one or three components
            height, width = data[place + 3] << 8 | data[place + 4], data[place + 5] << 8 | data[place + 6]
            plain = usual and data[place + 2] == 8 and data[place + 7] in (1, 3)
            plain = plain and height * width > 0
            return _Frame(place + 3, (height, width), marker == 0xC0, plain)
        if marker not in _USUAL and marker not in _APPLICATION:
            return None
        usual = usual and marker in _USUAL
    return None


def _pillows_header(image: Image.Image) -> Header | None:
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    return Header((image.height, image.width), _TURNS.get(orientation(image), _TURNS[1]))


def reduction(part: tuple[int, int], size: tuple[int, int]) -> int:
    """Give the factor by which to decode smaller: the greatest that leaves a part as large as it is to become."""
    return next((factor for factor in (8, 4, 2) if all(p >= factor * s for p, s in zip(part, size, strict=True))), 1)


def decode_part(
    data: bytes, header: Header, part: Rectangle, size: tuple[int, int], interpolation: str, mode: str
) -> torch.Tensor | None:
    """Decode a rectangle of a JPEG at another size.

    Args:
        data: The JPEG.
        header: What its header says.
        part: The rectangle.
        size: Height and width that it is resized to.
        interpolation: bilinear or bicubic.
        mode: `RGB`, or `L` for one channel.

    Returns:
        `(C, H, W)` uint8, channels last in memory; None for what the decoder refuses.
    """
    import simplejpeg

    factor = reduction((part.height, part.width), size)
    rows, columns = header.stored
    # rows below the part need not be decoded; a few more than its own decide how colours run out at its edge
    needed = part.top + part.height + _MARGIN * factor
    cut = needed < rows and header.rows_at is not None and _is_one_scan(data)
    if cut:
        rows, data = needed, _with_rows(data, header, needed)
    height, width = ceil(rows / factor), ceil(columns / factor)
    colours = "RGB" if mode == "RGB" else "GRAY"
    try:
        # it warns of the rows that are left over, and not to be strict is to pass over warnings, as Pillow does
        pixels = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width, strict=not cut)
    except ValueError:  # of damage that Pillow may pass over, too: it decides
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
    # decoded smaller, a side is rounded up at its stored end, which is its first one where it is turned round
    (height, width), (all_rows, all_columns) = pixels.shape[:2], header.upright
    top = part.top / factor + (height - all_rows / factor if rows_turned else 0.0)
    left = part.left / factor + (width - all_columns / factor if columns_turned else 0.0)
    bottom, right = top + part.height / factor, left + part.width / factor
    own = np.ascontiguousarray(pixels[floor(top) : ceil(bottom), floor(left) : ceil(right)])
    # the edges fall between pixels, where Pillow alone can cut: rounding them would treble the mean error
    box = (left % 1, top % 1, min(right - floor(left), own.shape[1]), min(bottom - floor(top), own.shape[0]))
    small = Image.fromarray(own if mode == "RGB" else own[:, :, 0])
    return to_tensor(small.resize(size[::-1], RESAMPLING[interpolation], box=box))


def _is_one_scan(data: bytes) -> bool:
    """Say whether a JPEG has one scan of its pixels, without a marker in it, and ends with the last marker.

    Then there is nothing in rows that are not decoded for which Pillow would refuse the file.
    """
    for marker, place in itertools.islice(segments(data), MAX_PARTS):
        if marker == 0xDA:
            scan = np.frombuffer(data, np.uint8, offset=place)
            following = scan[np.flatnonzero(scan[:-1] == 0xFF) + 1]  # by a zero, what is before it is no marker
            return data.endswith(b"\xff\xd9") and np.count_nonzero(following) == 1
    return False


def _with_rows(data: bytes, header: Header, rows: int) -> bytes:
    """Let a JPEG say that it has only so many rows."""
    assert header.rows_at is not None
    return data[: header.rows_at] + rows.to_bytes(2, "big") + data[header.rows_at + 2 :]


class FastTransform:
    """timm's evaluation transform with the fast decoder, for prediction: pixels are near to timm's, not equal.

    Args:
        input: The images that the model takes.
        max_pixels: Pixels above which an image is unreadable.

    Raises:
        ModuleNotFoundError: If simplejpeg is not installed.
    """

    def __init__(self, input: InputConfig, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        from torchvision.transforms import Resize

        importlib.import_module("simplejpeg")
        self.whole = EvalTransform(input)
        self.max_pixels = max_pixels
        self.resize, self.crop, *_, self.normalize = self.whole.timms.transforms
        self.mode = input.mode
        self.interpolation: str = input.interpolation
        self.fast = type(self.resize) is Resize and self.interpolation in RESAMPLING

    def __call__(self, row: dict[str, Any]) -> torch.Tensor:
        """Decode and transform a stored image: normalised, `(C, H, W)` float32.

        Raises:
            UnreadableImageError: If it cannot be decoded.
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
        """Give the size to which torchvision resizes, by the shorter side or to both sides."""
        if not isinstance(self.resize.size, int):
            height, width = self.resize.size
            return height, width
        shorter = min(size)
        height, width = (int(self.resize.size * side / shorter) for side in size)
        return height, width


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Give the pixels of an image, `(C, H, W)` uint8, channels last in memory."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Give an image of pixels `(C, H, W)` uint8, of three channels or one."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy())


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize pixels `(H, W, C)` by the antialiased filters that Pillow has as well."""
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # so that torch sees channels last, which it is fast in
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True, align_corners=False)[0]
