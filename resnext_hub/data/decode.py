"""From an encoded image to pixels, the same for every kind of file that people have.

What is shown is what counts: EXIF orientation is applied, an animation gives its first frame, grey becomes three equal
channels, sixteen bits are scaled to eight, CMYK is converted. Transparency is dropped, as timm's and transformers' own
readers do, so that a published model sees the same pixels there.

Files are hostile until shown otherwise: only regular files are opened, only the formats of the known suffixes are read
(Pillow would run Ghostscript on an EPS file), and the header bounds memory and time before anything is decoded.
"""

import contextlib
import io
import itertools
import re
import struct
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from resnext_hub.errors import one_line
from resnext_hub.files import FileTooLargeError, read_regular

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read: those of the known suffixes."""

MAX_IMAGE_PIXELS = 100_000_000
"""Pixels above which an image is unreadable unless a request says otherwise; 0.4 GB as Pillow holds them."""

MAX_ASPECT = 1000
"""How many times a side may be as long as the other: beyond it, nothing is left of the shorter one."""

MAX_SCANS = 100
"""Scans of a JPEG: each costs a pass over all pixels, however short it is. Progressive files have about ten."""

MAX_PARTS = 10_000
"""Chunks of a PNG, segments or fill bytes of a JPEG besides its pixels: Pillow takes some microseconds for each."""

_MAX_PASSES = 20
"""How often the greatest number of pixels may be passed over by the scans of one image: some seconds."""

_BARE = {marker & 0xFF for marker, (_, _, handler) in JpegImagePlugin.MARKER.items() if handler is None} | {0}
"""Markers of a JPEG after which Pillow expects no length."""

_PPM_HEADER = 1 << 16
"""Bytes in which the header of a PPM has to end."""

_BAND_PIXELS = 1 << 20
"""Pixels of which the depth is reduced at once."""


class UnreadablePictureError(Exception):
    """An image that cannot be decoded; the message is the reason."""


def decode(row: dict[str, Any] | None, mode: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image.

    Args:
        row: `bytes`, or a `path` where there are none, as the library datasets has undecoded images.
        mode: `RGB`, or `L` for one channel.
        max_pixels: Pixels above which it is unreadable.

    Raises:
        UnreadablePictureError: If there is nothing to read, it is no image, it is cut off, or its header asks for more
            memory or time than an image needs.
    """
    with opened(read_bytes(row, max_pixels), max_pixels) as image:
        return upright(image, mode)


def read_bytes(row: dict[str, Any] | None, max_pixels: int = MAX_IMAGE_PIXELS) -> bytes:
    """Return the bytes of an image as it is stored.

    Raises:
        UnreadablePictureError: If there are none, or far more than an image of so many pixels has.
    """
    row = row or {}  # a table may hold a null
    data: bytes | None = row.get("bytes")
    path: str | None = row.get("path")
    if data is None and path is None:
        raise UnreadablePictureError("neither bytes nor a path")
    try:
        # sixteen bits in four channels, uncompressed, and what a program has to say beside them
        data = read_regular(str(path), limit=8 * max_pixels + (1 << 26)) if data is None else data
    except FileNotFoundError as error:
        raise UnreadablePictureError("the file is gone") from error
    except FileTooLargeError as error:
        raise UnreadablePictureError(f"a file too large for {max_pixels} pixels (--max-image-pixels)") from error
    except (OSError, ValueError, MemoryError) as error:  # a path with a NUL is a ValueError
        raise UnreadablePictureError(_reason(error)) from error
    if not data:
        raise UnreadablePictureError("zero bytes")
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
        UnreadablePictureError: If it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata in what it can still read
            _require_parts(data)
            _require_ppm_header(data)
            if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = max_pixels  # where Pillow would refuse what the request allows
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                require_size(image.width, image.height, max_pixels)
                _require_tiles(image, max_pixels)
                require_scans(data, image.width * image.height, max_pixels)
                yield image
    except UnidentifiedImageError as error:
        raise UnreadablePictureError("not an image") from error
    except Image.DecompressionBombError as error:
        raise UnreadablePictureError(f"more than {max_pixels} pixels (--max-image-pixels)") from error
    except _DAMAGED as error:
        raise UnreadablePictureError(_reason(error)) from error


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Call an image unreadable for which there is not enough memory.

    Raises:
        UnreadablePictureError: If it is so.
    """
    try:
        yield
    except MemoryError as error:
        raise UnreadablePictureError(_reason(error)) from error
    except RuntimeError as error:  # torch's allocator
        if "not enough memory" not in str(error) and "allocate memory" not in str(error):
            raise
        raise UnreadablePictureError(_reason(MemoryError())) from error


def require_size(width: int, height: int, max_pixels: int) -> None:
    """Raise UnreadablePictureError for an image that its header makes too large, too long, or empty."""
    if min(width, height) < 1:
        raise UnreadablePictureError(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise UnreadablePictureError(f"{width} x {height} is more than {max_pixels} pixels (--max-image-pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadablePictureError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def require_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """Raise UnreadablePictureError for a JPEG of so many scans that they can only be meant to take time."""
    if data[:2] == b"\xff\xd8":
        values = np.frombuffer(data, np.uint8)
        scans = np.count_nonzero(values[1:][values[:-1] == 0xFF] == 0xDA)  # in pixels, a zero follows each 0xFF
        most = min(MAX_SCANS, _MAX_PASSES * max_pixels // pixels)
        if scans > most:
            raise UnreadablePictureError(f"{scans} scans of {pixels} pixels, more than {most}")


def _require_parts(data: bytes) -> None:
    """Refuse a file of so many parts beside its pixels that they can only be meant to take time."""
    parts = _png_chunks(data) if data.startswith(b"\x89PNG") else segments(data)
    if next(itertools.islice(parts, MAX_PARTS, None), None) is not None:
        raise UnreadablePictureError(f"more than {MAX_PARTS} parts beside its pixels")


def _require_ppm_header(data: bytes) -> None:
    """Refuse a PPM whose header has no end: Pillow reads it byte by byte, with comments of any length."""
    if re.match(rb"P[0-7fyFY][\s#]", data):
        words = re.sub(rb"#[^\r\n]*", b"", data[:_PPM_HEADER]).split(maxsplit=4)
        if len(data) > _PPM_HEADER and len(words) < 4:
            raise UnreadablePictureError(f"a header of more than {_PPM_HEADER} bytes")


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the kinds of the chunks of a PNG, without those of pixels."""
    place = 8
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        if kind not in (b"IDAT", b"fdAT", b"fcTL"):
            yield kind
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the parts of a JPEG from its first: the marker of each, and the place of what follows that, its length."""
    place = 2
    if data[:2] != b"\xff\xd8":
        return
    while place + 4 <= len(data) and data[place] == 0xFF:
        yield data[place + 1], place + 2
        if data[place + 1] == 0xFF:  # any number of these may stand before a marker
            place += 1
        else:
            place += 2 if data[place + 1] in _BARE else 2 + (data[place + 2] << 8 | data[place + 3])


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _require_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF of small size in tiles of any: one is decoded whole."""
    tags = getattr(image, "tag_v2", None) or {}
    width, height = (tags.get(tag, 1) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength))
    if width * height > max_pixels:
        raise UnreadablePictureError(f"tiles of {width} x {height}, more than {max_pixels} pixels (--max-image-pixels)")


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
    """Return the EXIF orientation of an image, 1 where it says none or its metadata are damaged."""
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
    """Scale grey of sixteen or more bits to eight, where Pillow's own conversion would clip; a band at a time."""
    sixteen = image.mode.startswith("I;16")
    low, high = (0, 65535) if sixteen else image.getextrema()
    pixels = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if not np.isfinite(band).all():
            raise UnreadablePictureError("pixels that are not finite")
        if image.mode == "F":
            band = band * 255 if 0 <= low <= high <= 1 else band  # type: ignore[operator]
        elif high > 255:  # type: ignore[operator]
            band = band // 257
        pixels[top : top + rows] = np.clip(band, 0, 255)
    return Image.fromarray(pixels)
