"""Decode Netpbm images (PBM, PGM and PPM, plain and binary) with NumPy; Pillow takes a microsecond per pixel.

Values are scaled from 0..maxval of the header to 0..255; see https://netpbm.sourceforge.net/doc/.
"""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

_HEADER_BYTES = 1 << 16
"""Most bytes of a header, including comments."""

_PLAIN_BYTES = 1 << 26
"""Most bytes of a plain file, whose numbers are text."""

_COMMENTS = 10_000
"""Most comments among the numbers of a plain file."""

_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_NUMBER = rb"(\d{1,10})"
_BITMAP = re.compile(rb"P[14]" + _GAP + _NUMBER + _GAP + _NUMBER + rb"\s")
_GREY_OR_COLOUR = re.compile(rb"P[2356]" + _GAP + _NUMBER + _GAP + _NUMBER + _GAP + _NUMBER + rb"\s")


@dataclass(frozen=True)
class Header:
    """The header of a Netpbm image."""

    kind: int
    """The digit of the magic number: 1 to 3 plain, 4 to 6 binary; each bitmap, grayscale, color."""
    width: int
    height: int
    maxval: int
    """The value of white; 1 for bits."""
    end: int
    """Offset of the pixels in the file."""

    @property
    def channels(self) -> int:
        """Number of values per pixel."""
        return 3 if self.kind in (3, 6) else 1


def is_netpbm(data: bytes) -> bool:
    """Return whether a file starts like PBM, PGM or PPM."""
    return re.match(rb"P[1-6][\s#]", data) is not None


def read_header(data: bytes) -> Header:
    """Read the header.

    Raises:
        ValueError: If it is damaged or too long.
    """
    kind = int(data[1:2])
    match = (_BITMAP if kind in (1, 4) else _GREY_OR_COLOUR).match(data[:_HEADER_BYTES])
    if match is None:
        raise ValueError(
            f"a header of more than {_HEADER_BYTES} bytes" if len(data) > _HEADER_BYTES else "a damaged Netpbm header"
        )
    width, height, maxval = (*map(int, match.groups()), 1)[:3]
    if not 0 < maxval < 65536:
        raise ValueError(f"maxval={maxval} in its header; expected 1 to 65535")
    return Header(kind, width, height, maxval, match.end())


def read_pixels(data: bytes, header: Header) -> Image.Image:
    """Decode the pixels to mode L or RGB.

    Raises:
        ValueError: If they are truncated, greater than maxval, or not numbers.
    """
    values = _plain(data, header) if header.kind < 4 else _binary(data, header)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= header.maxval:
        raise ValueError(
            f"values range from {values.min()} to {values.max()}; expected 0 to {header.maxval} (maxval in its header)"
        )
    if header.maxval != 255:
        values = np.rint(np.arange(header.maxval + 1) / header.maxval * 255).astype(np.uint8)[values]
    if header.kind in (1, 4):
        values = 255 - values  # a set bit is black
    shape = (header.height, header.width, 3) if header.channels == 3 else (header.height, header.width)
    return Image.fromarray(values.astype(np.uint8, copy=False).reshape(shape))


def _binary(data: bytes, header: Header) -> np.ndarray:
    if header.kind == 4:
        columns = (header.width + 7) // 8
        packed: np.ndarray = _values(data, header, header.height * columns, np.dtype(np.uint8))
        return np.unpackbits(packed.reshape(header.height, columns), axis=1)[:, : header.width]
    count = header.height * header.width * header.channels
    return _values(data, header, count, np.dtype(np.uint8 if header.maxval < 256 else ">u2"))


def _values(data: bytes, header: Header, count: int, kind: np.dtype) -> np.ndarray:
    _require(len(data) - header.end, count * kind.itemsize, "bytes")
    return np.frombuffer(data, kind, count, header.end)


def _plain(data: bytes, header: Header) -> np.ndarray:
    if len(data) > _PLAIN_BYTES:
        raise ValueError(f"a plain Netpbm file of more than {_PLAIN_BYTES} bytes; store it as binary Netpbm or as PNG")
    if data.count(b"#", header.end) > _COMMENTS:
        raise ValueError(f"more than {_COMMENTS} comments")
    count = header.width * header.height * header.channels
    text = re.sub(rb"#[^\r\n]*", b"", data[header.end :])
    if header.kind == 1:  # digits need no whitespace between them
        digits = np.frombuffer(text.translate(None, b" \t\n\v\f\r"), np.uint8)[:count]
        values = digits - np.uint8(ord("0"))
    else:
        values = _numbers(text)[:count]
    _require(len(values), count, "numbers")
    return values


def _numbers(text: bytes) -> np.ndarray:
    if not text.strip():
        return np.empty(0, np.int64)
    try:
        return np.fromstring(text, np.int64, sep=" ")
    except ValueError as error:
        raise ValueError("some pixels are not integers") from error


def _require(found: int, needed: int, what: str) -> None:
    if found < needed:
        raise ValueError(f"the file is truncated: {found} of {needed} {what}")
