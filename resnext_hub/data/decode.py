"""From an encoded image to pixels, the same for every kind of file that people have.

What is shown is what counts: EXIF orientation is applied, an animation gives its first frame, grey becomes three equal
channels, sixteen bits are scaled to eight, CMYK is converted. Transparency is dropped, as timm's and transformers' own
readers do, so that a published model sees the same pixels there.

Files are hostile until shown otherwise: only regular files are opened, only the formats of the known suffixes are read
(Pillow would run Ghostscript on an EPS file), and the header bounds memory and time before anything is decoded.
"""

import contextlib
import struct
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from resnext_hub.data import bounds, netpbm
from resnext_hub.errors import one_line
from resnext_hub.files import LFS_POINTER, FileTooLargeError, read_regular

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read: those of the known suffixes."""

MAX_IMAGE_PIXELS = 100_000_000
"""Pixels above which an image is unreadable unless a request says otherwise; 0.4 GB as Pillow holds them."""

MAX_ASPECT = 1000
"""How many times a side may be as long as the other: beyond it, nothing is left of the shorter one."""

MAX_SCANS = 100
"""Scans of a JPEG: each costs a pass over all pixels, however short it is. Progressive files have about ten."""

_MAX_PASSES = 20
"""How often the greatest number of pixels may be passed over by the scans of one image: some seconds."""

_RAW_PROFILE = 1 << 20
"""Characters of Exif as text in a PNG; two for each byte."""

_BAND_PIXELS = 1 << 20
"""Pixels of which the depth is reduced at once."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message is the reason."""


def decode(row: dict[str, Any] | None, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image.

    Args:
        row: `bytes`, or a `path` where there are none, as the library datasets has undecoded images.
        mode: `RGB`, or `L` for one channel.
        max_pixels: Pixels above which it is unreadable.

    Raises:
        UnreadableImageError: If there is nothing to read, it is no image, it is cut off, or its header asks for more
            memory or time than an image needs.
    """
    with opened(read_bytes(row, max_pixels), max_pixels) as image:
        return upright(image, mode)


def read_bytes(row: dict[str, Any] | None, max_pixels: int = MAX_IMAGE_PIXELS) -> bytes:
    """Return the bytes of an image as it is stored.

    Raises:
        UnreadableImageError: If there are none, or far more than an image of so many pixels has.
    """
    row = row or {}  # a table may hold a null
    data: bytes | None = row.get("bytes")
    path: str | None = row.get("path")
    if data is None and path is None:
        raise UnreadableImageError("neither bytes nor a path")
    limit = 8 * max_pixels + (1 << 26)  # sixteen bits in four channels, and what a program has to say beside them
    try:
        data = read_regular(str(path), limit) if data is None else data
        if len(data) > limit:
            raise FileTooLargeError(f"{len(data)} bytes")
    except FileNotFoundError as error:
        raise UnreadableImageError("the file is gone") from error
    except FileTooLargeError as error:
        raise UnreadableImageError(f"a file too large for {max_pixels} pixels (--max-image-pixels)") from error
    except (OSError, ValueError, MemoryError) as error:  # a path with a NUL is a ValueError
        raise UnreadableImageError(_reason(error)) from error
    if not data:
        raise UnreadableImageError("zero bytes")
    return data


_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
)
"""What Pillow's readers of the many formats raise for damaged files, and what an image costs that is too large."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is turned to stand upright, by EXIF orientation."""


@contextlib.contextmanager
def opened(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Image.Image]:
    """Read the header of an image; what then fails in decoding it says why in the same words.

    Raises:
        UnreadableImageError: If it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata in what it can still read
            if netpbm.is_netpbm(data):
                header = netpbm.read_header(data)
                require_size(header.width, header.height, max_pixels)
                yield netpbm.read_pixels(data, header)
                return
            require_parts(data)
            data = bounds.without_avif_exif(data)
            file = bounds.MeteredFile(data)
            if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = max_pixels  # where Pillow would refuse what the request allows
            with Image.open(file, formats=_formats()) as image:
                require_size(image.width, image.height, max_pixels)
                bounds.allow_runs(file, image)
                _require_tiles(image, data, max_pixels)
                require_scans(data, image.width * image.height, max_pixels)
                yield image
    except UnidentifiedImageError as error:
        pointer = data.startswith(LFS_POINTER)
        reason = "a Git LFS pointer, not the image itself; run `git lfs pull`" if pointer else "not an image"
        raise UnreadableImageError(reason) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than {max_pixels} pixels (--max-image-pixels)") from error
    except _DAMAGED as error:
        raise UnreadableImageError(_reason(error)) from error


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Call an image unreadable for which there is not enough memory.

    Raises:
        UnreadableImageError: If it is so.
    """
    try:
        yield
    except MemoryError as error:
        raise UnreadableImageError(_reason(error)) from error
    except RuntimeError as error:  # torch's allocator
        if "not enough memory" not in str(error) and "allocate memory" not in str(error):
            raise
        raise UnreadableImageError(_reason(MemoryError())) from error


def require_size(width: int, height: int, max_pixels: int) -> None:
    """Raise UnreadableImageError for an image that its header makes too large, too long, or empty."""
    if min(width, height) < 1:
        raise UnreadableImageError(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise UnreadableImageError(f"{width} x {height} is more than {max_pixels} pixels (--max-image-pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImageError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def require_parts(data: bytes) -> None:
    """Raise UnreadableImageError for a file whose metadata can only be meant to take time or memory."""
    try:
        bounds.require_few_parts(data)
    except ValueError as error:
        raise UnreadableImageError(_reason(error)) from error


def require_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """Raise UnreadableImageError for a JPEG of so many scans that they can only be meant to take time."""
    if data.startswith(b"\xff\xd8"):
        most = min(MAX_SCANS, _MAX_PASSES * max_pixels // pixels)
        scans = bounds.count_scans(data, most)
        if scans > most:
            raise UnreadableImageError(f"more than {most} scans of {pixels} pixels")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _require_tiles(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse a TIFF of small size in tiles of any, which are decoded whole, and one of JPEGs of many scans."""
    tags = getattr(image, "tag_v2", None)
    if not tags:
        return
    width, height = (tags.get(tag) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength))
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        pixels = -(-image.width // width) * width * (-(-image.height // height)) * height
        if width * height > max_pixels or pixels > 4 * max_pixels:  # those at the edges reach beyond it
            raise UnreadableImageError(
                f"tiles of {width} x {height}, more than {max_pixels} pixels (--max-image-pixels)"
            )
    if tags.get(ExifTags.Base.Compression) in (6, 7):  # JPEG
        offsets = tags.get(ExifTags.Base.StripOffsets) or tags.get(ExifTags.Base.TileOffsets) or ()
        scans = data.count(b"\xff\xda") / max(1, len(set(offsets)))
        if scans * image.width * image.height > _MAX_PASSES * max_pixels:
            raise UnreadableImageError(f"{scans:.0f} scans of {image.width * image.height} pixels")


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:200]


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image whose header was read, turned as its EXIF orientation says."""
    image.load()
    # Pillow's own exif_transpose writes the rest of the EXIF anew, and fails where that is odd
    turn = _TURNS.get(orientation(image))
    return _to_mode(image if turn is None else image.transpose(turn), mode)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 where it says none or its metadata are damaged.

    Raises:
        ValueError: If its metadata can only be meant to take time.
    """
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        bounds.require_few_numbers(exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0"))
    elif len(image.info.get("Raw profile type exif", "")) > _RAW_PROFILE:
        raise ValueError(f"Exif of more than {_RAW_PROFILE} characters")
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) else 1


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    elif image.mode == "P":
        image = image.convert("RGBA")  # palettes carry transparency in ways that only this conversion understands
    return image if image.mode == mode else image.convert(mode)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than eight bits by what its type can hold, a band at a time; fractions go from 0 to 1.

    The values of one image are no guide: another one of the same dataset would be scaled otherwise.
    """
    if image.mode == "I":
        raise UnreadableImageError("signed or 32-bit numbers, whose range is not known; store 8 or 16 bits")
    white, inverted = _range_of(image)
    pixels = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if not np.isfinite(band).all():
            raise UnreadableImageError("pixels that are not finite")
        if image.mode != "F":
            band = np.minimum(band, white).astype(np.uint32) * 255 // white
        elif band.min() < 0 or band.max() > 1:
            raise UnreadableImageError(
                f"floating-point pixels from {band.min():.4g} to {band.max():.4g}; expected 0 to 1"
            )
        else:
            band = band * 255
        pixels[top : top + rows] = 255 - band if inverted else band
    return Image.fromarray(pixels)


def _range_of(image: Image.Image) -> tuple[int, bool]:
    """Return the value of the brightest pixel that a type can hold, and whether it is black."""
    tags = getattr(image, "tag_v2", None) or {}
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    return (1 << bits) - 1, tags.get(ExifTags.Base.PhotometricInterpretation) == 0
