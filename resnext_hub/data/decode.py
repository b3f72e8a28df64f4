"""Decode images of all supported formats to 8-bit RGB or grayscale pixels.

EXIF orientation is applied, the first frame of an animation is used, grayscale becomes three equal channels, 16 bits
are scaled to 8, CMYK is converted. Transparency is dropped as timm and transformers do, so a published model sees the
same pixels there.

Files are untrusted: only regular files are opened, only the formats of the known suffixes are read (Pillow would run
Ghostscript on an EPS file), and the header limits memory and time before anything is decoded.
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
"""Supported formats by Pillow's names: those of the known suffixes."""

MAX_IMAGE_PIXELS = 100_000_000
"""Default limit: images with more pixels are unreadable. They take 0.4 GB in Pillow."""

MAX_ASPECT = 1000
"""Greatest ratio of the sides; beyond it, resizing leaves nothing of the shorter one."""

MAX_SCANS = 100
"""Most scans of a JPEG: however short, each costs a pass over all pixels. Progressive files have about ten."""

_MAX_PASSES = 20
"""Most passes of `max_pixels` pixels that the scans of one image may cost: some seconds."""

_RAW_PROFILE = 1 << 20
"""Most characters of Exif data stored as hexadecimal text in a PNG, two per byte."""

_BAND_PIXELS = 1 << 20
"""Pixels that are reduced to 8 bits at once."""


class UnreadableImageError(Exception):
    """An image cannot be decoded; the message is the reason."""


def decode(row: dict[str, Any] | None, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image.

    Args:
        row: `bytes`, or a `path` if there are none, as datasets represents undecoded images.
        mode: `RGB`, or `L` for one channel.
        max_pixels: Images with more pixels are unreadable.

    Raises:
        UnreadableImageError: If it is missing, not an image, truncated, or its header demands more memory or time than
            any legitimate image needs.
    """
    with opened(read_bytes(row, max_pixels), max_pixels) as image:
        return upright(image, mode)


def read_bytes(row: dict[str, Any] | None, max_pixels: int = MAX_IMAGE_PIXELS) -> bytes:
    """Return the encoded bytes of an image.

    Raises:
        UnreadableImageError: If there are none, or far more than an image of `max_pixels` pixels has.
    """
    row = row or {}  # None for a null in the table
    data: bytes | None = row.get("bytes")
    path: str | None = row.get("path")
    if data is None and path is None:
        raise UnreadableImageError("neither bytes nor a path")
    limit = 8 * max_pixels + (1 << 26)  # four channels of 16 bits, and metadata
    try:
        data = read_regular(str(path), limit) if data is None else data
        if len(data) > limit:
            raise FileTooLargeError(f"{len(data)} bytes")
    except FileNotFoundError as error:
        raise UnreadableImageError("the file does not exist") from error
    except FileTooLargeError as error:
        raise UnreadableImageError(
            f"the file is too large for an image of {max_pixels} pixels (limit: max_image_pixels)"
        ) from error
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a path with a NUL
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
"""What Pillow's decoders raise for damaged files, or if memory runs out."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes an image upright, by EXIF orientation."""


@contextlib.contextmanager
def opened(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Image.Image]:
    """Open an image and check its header; errors while decoding it in the block are converted as well.

    Raises:
        UnreadableImageError: If it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata in readable images
            if netpbm.is_netpbm(data):
                header = netpbm.read_header(data)
                require_size(header.width, header.height, max_pixels)
                yield netpbm.read_pixels(data, header)
                return
            require_parts(data)
            data = bounds.without_avif_exif(data)
            file = bounds.MeteredFile(data)
            if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = max_pixels  # else Pillow would refuse what our limit allows
            with Image.open(file, formats=_formats()) as image:
                require_size(image.width, image.height, max_pixels)
                bounds.allow_runs(file, image)
                _require_tiles(image, data, max_pixels)
                require_scans(data, image.width * image.height, max_pixels)
                yield image
    except UnidentifiedImageError as error:
        pointer = data.startswith(LFS_POINTER)
        reason = "a Git LFS pointer instead of an image; run `git lfs pull`" if pointer else "not an image"
        raise UnreadableImageError(reason) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than {max_pixels} pixels (limit: max_image_pixels)") from error
    except _DAMAGED as error:
        raise UnreadableImageError(_reason(error)) from error


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Convert out-of-memory errors into UnreadableImageError.

    Raises:
        UnreadableImageError: If memory runs out in the block.
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
    """Raise UnreadableImageError if an image is too large, too elongated or empty according to its header."""
    if min(width, height) < 1:
        raise UnreadableImageError(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise UnreadableImageError(f"{width} x {height} is more than {max_pixels} pixels (limit: max_image_pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImageError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def require_parts(data: bytes) -> None:
    """Raise UnreadableImageError if the metadata of a file exceeds what any legitimate file needs."""
    try:
        bounds.require_few_parts(data)
    except ValueError as error:
        raise UnreadableImageError(_reason(error)) from error


def require_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """Raise UnreadableImageError if a JPEG has more scans than any legitimate file needs."""
    if data.startswith(b"\xff\xd8"):
        most = min(MAX_SCANS, _MAX_PASSES * max_pixels // pixels)
        scans = bounds.count_scans(data, most)
        if scans > most:
            raise UnreadableImageError(f"more than {most} scans in an image of {pixels} pixels")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the supported formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _require_tiles(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raise UnreadableImageError for a small TIFF with huge tiles, which are decoded whole, or with too many scans."""
    tags = getattr(image, "tag_v2", None)
    if not tags:
        return
    width, height = (tags.get(tag) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength))
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        pixels = -(-image.width // width) * width * (-(-image.height // height)) * height
        if width * height > max_pixels or pixels > 4 * max_pixels:  # tiles at the edges extend beyond the image
            raise UnreadableImageError(
                f"tiles of {width} x {height} with more than {max_pixels} pixels in total (limit: max_image_pixels)"
            )
    if tags.get(ExifTags.Base.Compression) in (6, 7):  # JPEG
        offsets = tags.get(ExifTags.Base.StripOffsets) or tags.get(ExifTags.Base.TileOffsets) or ()
        scans = data.count(b"\xff\xda") / max(1, len(set(offsets)))
        if scans * image.width * image.height > _MAX_PASSES * max_pixels:
            raise UnreadableImageError(
                f"too many scans ({scans:.0f}) for an image of {image.width * image.height} pixels"
            )


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory to decode the image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:200]


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Decode an opened image and apply its EXIF orientation."""
    image.load()
    # Pillow's exif_transpose rewrites the other EXIF tags, and fails on malformed ones
    turn = _TURNS.get(orientation(image))
    return _to_mode(image if turn is None else image.transpose(turn), mode)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 if it has none or its metadata is damaged.

    Raises:
        ValueError: If its metadata exceeds what any legitimate file needs.
    """
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        bounds.require_few_numbers(exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0"))
    elif len(image.info.get("Raw profile type exif", "")) > _RAW_PROFILE:
        raise ValueError(f"more than {_RAW_PROFILE} characters of Exif data")
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) else 1


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    elif image.mode == "P":
        image = image.convert("RGBA")  # only this conversion handles every kind of transparency in a palette
    return image if image.mode == mode else image.convert(mode)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grayscale of more than 8 bits by the range of its type, band by band; floats range from 0 to 1.

    It is not scaled by the range of its values, which would differ between images of one dataset.
    """
    if image.mode == "I":
        raise UnreadableImageError("the range of signed or 32-bit pixels is unknown; store 8-bit or 16-bit pixels")
    white, inverted = _range_of(image)
    pixels = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if not np.isfinite(band).all():
            raise UnreadableImageError("some pixels are not finite")
        if image.mode != "F":
            band = np.minimum(band, white).astype(np.uint32) * 255 // white
        elif band.min() < 0 or band.max() > 1:
            raise UnreadableImageError(
                f"floating-point pixels range from {band.min():.4g} to {band.max():.4g}; expected 0 to 1"
            )
        else:
            band = band * 255
        pixels[top : top + rows] = 255 - band if inverted else band
    return Image.fromarray(pixels)


def _range_of(image: Image.Image) -> tuple[int, bool]:
    """Return the greatest value of an image's pixel type, and whether it stands for black."""
    tags = getattr(image, "tag_v2", None) or {}
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    return (1 << bits) - 1, tags.get(ExifTags.Base.PhotometricInterpretation) == 0
