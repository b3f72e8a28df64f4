"""Limits on the time and memory that the metadata of an image file may cost.

Pillow decodes pixels in C, but parses files in Python. So the number of reads is limited for every format, and so is
whatever makes a single read expensive: tables, Exif and text of a JPEG or PNG, numbers in a TIFF, runs in a BMP, items
of an AVIF. Legitimate files stay far below. A file above a limit raises ValueError with the reason.
"""

import io
import itertools
import re
import struct
from collections.abc import Iterator
from typing import Literal, TypeAlias

from PIL import Image, JpegImagePlugin

Order: TypeAlias = Literal["little", "big"]

MAX_PARTS = 10_000
"""Most segments or fill bytes of a JPEG before its pixels, and items of an AVIF."""

_READS = 100_000
"""Reads that any file may take, plus one per kilobyte: less than a second."""

_PARSED_PARTS = 100
"""Most tables and frames of a JPEG, or compressed chunks of a PNG; each may take some milliseconds."""

_EXIF_SEGMENTS = 16
"""Most Exif segments (64 kB each) of a JPEG, which Pillow concatenates one by one."""

_NUMBERS = 100_000
"""Most numbers in the tags of a TIFF or of Exif, including offsets of strips and tiles; some microseconds each."""

_RLE_PIXELS = 1 << 20
"""Most pixels of a run-length encoded BMP, which Pillow decodes in Python: some seconds."""

_AVIF_ITEMS = 1 << 16
"""Most bytes that describe the items of an AVIF. libavif's search is quadratic in them; a tile takes about 40."""

_BARE = {marker & 0xFF for marker, (_, _, handler) in JpegImagePlugin.MARKER.items() if handler is None} | {0}
"""JPEG markers after which Pillow expects no length."""

_TABLES = {
    marker & 0xFF
    for marker, (_, _, handler) in JpegImagePlugin.MARKER.items()
    if handler in (JpegImagePlugin.SOF, JpegImagePlugin.DQT)
}
"""JPEG markers whose segments Pillow parses entry by entry."""


class MeteredFile(io.BytesIO):
    """The bytes of a file, with a limit on the number of reads."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = _READS + len(data) // 1024

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes.

        Raises:
            ValueError: If the limit is reached.
        """
        self.left -= 1
        if self.left < 0:
            raise ValueError("too many parts in addition to the pixel data")
        return super().read(size)


def require_few_parts(data: bytes) -> None:
    """Raise ValueError if the metadata of a file exceeds what any legitimate file needs."""
    if data.startswith(b"\xff\xd8"):
        _require_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        packed = sum(data.count(kind) for kind in (b"iCCP", b"zTXt", b"iTXt"))
        _require(packed, _PARSED_PARTS, "chunks of compressed text")
    elif data.startswith((b"II", b"MM")):
        require_few_numbers(data)
    elif data.startswith(b"BM"):
        _require_bmp(data)
    elif data[4:8] == b"ftyp":
        _require_avif(data)


def _require(found: int, most: int, what: str) -> None:
    if found > most:
        raise ValueError(f"more than {most} {what}")


def _require_jpeg(data: bytes) -> None:
    parts = [*itertools.islice(segments(data), MAX_PARTS + 1)]
    _require(len(parts), MAX_PARTS, "segments besides the pixel data")
    _require(sum(marker in _TABLES for marker, _ in parts), _PARSED_PARTS, "tables")
    exif = sum(data.startswith(b"Exif\0\0", offset + 2) for marker, offset in parts if marker == 0xE1)
    _require(exif, _EXIF_SEGMENTS, "Exif segments")
    end = parts[-1][1] if parts else 0  # of the last segment, which is the first scan
    _require(data.count(b"8BIM", 0, end), MAX_PARTS, "Photoshop blocks")


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment of a JPEG up to its first scan, and the offset of the length that follows it.

    Bytes that are not a marker are skipped, as Pillow does.
    """
    offset = 2
    if data[:2] != b"\xff\xd8":
        return
    while 0 <= offset <= len(data) - 4:
        if data[offset] != 0xFF:
            offset = data.find(b"\xff", offset)
            continue
        marker = data[offset + 1]
        yield marker, offset + 2
        if marker == 0xDA:
            return
        if marker == 0xFF:  # any number of these may stand before a marker
            offset += 1
        else:
            offset += 2 if marker in _BARE else 2 + (data[offset + 2] << 8 | data[offset + 3])


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""A marker other than scan data or a restart within a scan."""


def count_scans(data: bytes, most: int) -> int:
    """Count the scans of a JPEG up to its end, stopping at `most + 1`.

    Bytes after the end are not searched: phones append videos there.
    """
    offset = 2
    scans = parts = 0
    while scans <= most and (mark := _MARKER.search(data, offset)) and mark[0] not in (b"\xff\xd8", b"\xff\xd9"):
        parts += 1
        _require(parts, MAX_PARTS, "parts")
        scans += mark[0] == b"\xff\xda"
        offset = mark.end() + int.from_bytes(data[mark.end() : mark.end() + 2], "big")
    return scans


_DIRECTORIES = (34665, 34853, 40965)
"""Tags that hold the offset of a directory: Exif, GPS and interoperability."""

_DIRECTORIES_READ = 10
"""Directories that are checked; Pillow reads the first one and those three."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of a value by TIFF type; 1, 2 and 7 are bytes and text, which cost nothing."""


def require_few_numbers(data: bytes) -> None:
    """Raise ValueError for a TIFF, or Exif data, with more numbers in its tags than any legitimate file has."""
    order: Order = "little" if data.startswith(b"II") else "big"
    big = data[2:3] == b"+"  # as Pillow recognizes a BigTIFF
    waiting = [int.from_bytes(data[8:16] if big else data[4:8], order)]
    seen, numbers = set[int](), 0
    while waiting and len(seen) < _DIRECTORIES_READ:
        offset = waiting.pop()
        if offset in seen:
            continue
        seen.add(offset)
        for tag, kind, count, value in _entries(data, offset, order, big):
            size = _SIZES.get(kind, 0) * count
            start = int.from_bytes(value, order) if size > len(value) else None
            if not size or (start is not None and start + size > len(data)):
                continue  # Pillow ignores it, too
            numbers += 0 if kind in (1, 2, 7) else count
            if tag in _DIRECTORIES:
                first = value if start is None else data[start : start + 8]
                waiting.append(int.from_bytes(first[: _SIZES[kind]], order))
    _require(numbers, _NUMBERS, "numbers in its tags")


def _entries(data: bytes, offset: int, order: Order, big: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield tag, type, count and value of each entry of a TIFF directory."""
    width = 8 if big else 2
    count = int.from_bytes(data[offset : offset + width], order)
    entry = struct.Struct(("<" if order == "little" else ">") + ("HHQ8s" if big else "HHL4s"))
    count = min(count, max(0, len(data) - offset - width) // entry.size)
    _require(count, _NUMBERS, "tags")
    yield from entry.iter_unpack(data[offset + width : offset + width + count * entry.size])


def _require_bmp(data: bytes) -> None:
    if len(data) < 34 or int.from_bytes(data[14:18], "little") < 40:
        return
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression in (1, 2) and abs(width * height) > _RLE_PIXELS:
        raise ValueError(
            f"a run-length encoded BMP of {width} x {abs(height)} pixels is too large (limit: {_RLE_PIXELS} pixels); "
            "store it as PNG"
        )


def allow_runs(file: MeteredFile, image: Image.Image) -> None:
    """Allow a run-length encoded BMP two reads per run; a run has at least one pixel."""
    if image.format == "BMP" and image.info.get("compression") in (1, 2):
        file.left += 2 * image.width * image.height


def _require_avif(data: bytes) -> None:
    total = 0
    for box in re.finditer(rb"(.{4})(?:iinf|iloc|iref|ipma)", data, re.DOTALL):
        size = int.from_bytes(box[1], "big")
        if size == 1:  # the size follows, in 64 bits
            size = int.from_bytes(data[box.end() : box.end() + 8], "big")
        total += size if size <= len(data) else 0
    _require(total, _AVIF_ITEMS, "bytes of item descriptions")


def without_avif_exif(data: bytes) -> bytes:
    """Return an AVIF with its Exif and XMP hidden, since only its own boxes define its orientation."""
    if data[4:8] != b"ftyp":
        return data
    data = re.sub(rb"(infe\x02.{7}|infe\x03.{9})Exif", rb"\g<1>none", data, flags=re.DOTALL)
    return data.replace(b"application/rdf+xml\0", b"application/rdf+non\0")
