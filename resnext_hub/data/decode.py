"""From an encoded picture to pixels, the same for every kind of file that people have.

What is shown is what counts: EXIF orientation is applied, an animation gives its first frame, grey becomes three equal
channels, sixteen bits are scaled to eight, CMYK is converted. Transparency is dropped, as timm's and transformers' own
readers do, so that a published network sees the same pixels there.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError


class UnreadablePictureError(Exception):
    """A picture that cannot be decoded; the message is the reason."""


def decode(row: dict[str, Any], mode: str = "RGB") -> Image.Image:
    """Decode a picture.

    Args:
        row: `bytes`, or a `path` where there are none, as the library datasets has undecoded pictures.
        mode: `RGB`, or `L` for one channel.

    Raises:
        UnreadablePictureError: If there is nothing to read, it is no picture, it is cut off, or it has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`, as a decompression bomb would.
    """
    with opened(read_bytes(row)) as image:
        return upright(image, mode)


def read_bytes(row: dict[str, Any]) -> bytes:
    """Give the bytes of a picture as it is stored.

    Raises:
        UnreadablePictureError: If there are none.
    """
    data: bytes | None = row["bytes"]
    if data is None and row["path"] is None:
        raise UnreadablePictureError("neither bytes nor a path")
    try:
        data = Path(row["path"]).read_bytes() if data is None else data
    except FileNotFoundError as error:
        raise UnreadablePictureError("the file is gone") from error
    except OSError as error:
        raise UnreadablePictureError(error.strerror or type(error).__name__) from error
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
    RuntimeError,
    struct.error,
)
"""What Pillow's readers of the many formats raise for damaged files."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is turned to stand upright, by EXIF orientation."""


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Read the header of a picture; what then fails in decoding it says why in the same words.

    Raises:
        UnreadablePictureError: If it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except UnidentifiedImageError as error:
        raise UnreadablePictureError("not an image") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except _DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UnreadablePictureError(reason[:200] or type(error).__name__) from error


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Decode a picture whose header was read, turned as its EXIF orientation says."""
    image.load()
    # Pillow's own exif_transpose writes the rest of the EXIF anew, and fails where that is odd
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return _to_mode(image if turn is None else image.transpose(turn), mode)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # sixteen bits, for which Pillow's own conversion would clip instead of scale
        values = np.asarray(image).astype(np.int64)
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        image = Image.fromarray(np.clip(values // 257 if wide else values, 0, 255).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # palettes carry transparency in ways that only this conversion understands
    return image if image.mode == mode else image.convert(mode)
