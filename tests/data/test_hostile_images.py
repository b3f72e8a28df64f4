"""Malicious and unusual files are decoded or unreadable, in bounded time and memory."""

import contextlib
import io
import os
import random
import resource
import socket
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from pytest import fixture, mark, raises
from timm.data import create_transform

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.decode import FORMATS, UnreadableImageError, decode, within_memory
from resnext_hub.data.jpeg import FastTransform
from resnext_hub.data.sources import IMAGE_SUFFIXES
from resnext_hub.data.transforms import EvalTransform, TransformConfig
from resnext_hub.models.input_config import InputConfig

CFG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 0.875}


def timms_transform(config: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    return create_transform(**config, is_training=False)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def row(data: bytes) -> dict[str, object]:
    return {"bytes": data, "path": None}


@fixture
def odd_paths(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.jpg" for name in ("fifo", "folder", "device", "dangling", "loop", "sparse")}
    os.mkfifo(paths["fifo"])
    paths["folder"].mkdir()
    paths["device"].symlink_to("/dev/zero")
    paths["dangling"].symlink_to("nowhere")
    paths["loop"].symlink_to("loop.jpg")
    with open(paths["sparse"], "wb") as file:
        file.truncate(1 << 40)
    return paths


@mark.parametrize(
    ("name", "reason"),
    [
        ("fifo", "not a regular file but a FIFO"),
        ("folder", "not a regular file but a folder"),
        ("device", "not a regular file but a device"),
        ("dangling", "the file does not exist"),
        ("loop", "Too many levels of symbolic links"),
        ("sparse", r"the file is too large for an image of 100000000 pixels \(limit: max_image_pixels\)"),
    ],
)
def test_only_regular_files_of_reasonable_size_are_opened(name: str, reason: str, odd_paths: dict[str, Path]) -> None:
    stored = {"bytes": None, "path": str(odd_paths[name])}
    for read in (
        decode,
        Augmentation(TransformConfig(), InputConfig.resolve(CFG), "simplejpeg"),
        FastTransform(InputConfig.resolve(CFG)),
    ):
        with raises(UnreadableImageError, match=f"^{reason}$"):
            read(stored)


def test_sockets_nulls_and_nuls_are_unreadable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        with raises(UnreadableImageError, match="a socket"):
            decode({"bytes": None, "path": str(tmp_path / "s.jpg")})
    for stored in (None, {}, {"bytes": None, "path": None}, {"bytes": None, "path": "a\0b"}):
        with raises(UnreadableImageError):
            decode(stored)


def test_only_the_formats_of_the_known_suffixes_are_opened() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in IMAGE_SUFFIXES if suffix in known} <= set(FORMATS)
    image, others = Image.new("RGB", (40, 40)), set()
    for kind in sorted(set(Image.SAVE) - set(FORMATS) - {"IM", "MPO"}):  # IM warns, MPO is a JPEG
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):  # not writable by this build
            data = encoded(image, kind)
            others.add(kind)
            with raises(UnreadableImageError, match="not an image"):
                decode(row(data))
    assert {"EPS", "PDF", "ICO", "TGA"} <= others


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(height, 100) * (1 + 3 * min(width, 100))))
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tags(entries: list[tuple[int, int, int, int]]) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def grey_tiff(bits: int, photometric: int, pixels: bytes) -> bytes:
    """Return an uncompressed TIFF of two grayscale pixels."""
    sizes = [(256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)]
    return tags([*sizes, (273, 4, 1, 122), (277, 3, 1, 1), (279, 4, 1, len(pixels))]).ljust(122, b"\0") + pixels


def strips(count: int) -> bytes:
    """Return a TIFF of 8 x 8 pixels with a number of strips, all at the same offset."""
    sizes = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    head = tags([*sizes, (273, 4, count, 122), (278, 4, 1, 1), (279, 4, count, 122)])
    return head.ljust(122, b"\0") + struct.pack("<I", 8) * count


def rational_exif(count: int) -> bytes:
    """Return Exif data whose orientation is a number of fractions."""
    return tags([(0x0112, 5, count, 26)]) + struct.pack("<II", 1, 3) * count


def tiff_with_exif(exif: bytes) -> bytes:
    """Return a TIFF that ends with Exif data, whose offsets are relative to the file."""
    sizes = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tags([*sizes, (273, 4, 1, 8), (279, 4, 1, 64), (34665, 4, 1, 122)]) + exif


def run_length_bmp(side: int, runs: bytes, kind: int = 1) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8 // kind, kind, len(runs), 0, 0, 256 // kind**4, 0)
    palette = b"".join(bytes([i, 0, i, 0]) for i in range(256 // kind**4))
    start = 14 + len(sizes) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + sizes + palette + runs


def segment(marker: int, content: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(inside: bytes) -> bytes:
    whole = encoded(Image.new("L", (8, 8)), "JPEG")
    return whole[:2] + inside + whole[2:]


def gif_with(inside: bytes) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + inside + b",\0\0\0\0\x08\0\x08\0\0\x02\x07\x04\x01\0;"


def avif_with_items(count: int) -> bytes:
    """Return an AVIF with the locations of a number of additional items."""
    whole = encoded(Image.new("RGB", (8, 8)), "AVIF")
    meta, start = whole.index(b"meta") - 4, whole.index(b"iloc") - 4
    sizes = {place: int.from_bytes(whole[place : place + 4], "big") for place in (meta, start)}
    places = whole[start + 16 : start + sizes[start]] + b"".join(
        struct.pack(">HHH", i, 0, 0) for i in range(99, 99 + count)
    )
    found = int.from_bytes(whole[start + 14 : start + 16], "big") + count
    box = struct.pack(">I", 16 + len(places)) + whole[start + 4 : start + 14] + struct.pack(">H", found) + places
    longer = struct.pack(">I", sizes[meta] + 6 * count) + whole[meta + 4 : start] + box + whole[start + sizes[start] :]
    return whole[:meta] + longer


def tiled_tiff() -> bytes:
    """Return a TIFF of 16 x 16 pixels in tiles of 65536 x 65536."""
    sizes = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tags([*sizes, (322, 4, 1, 65536), (323, 4, 1, 65536), (324, 4, 1, 300), (325, 4, 1, 100)]) + bytes(400)


def wide_tiles() -> bytes:
    """Return a TIFF with a column of 1000 pixels in tiles of a hundred million pixels each."""
    sizes = [(256, 4, 1, 1), (257, 4, 1, 1000), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    places = [(322, 4, 1, 99_999_984), (323, 4, 1, 1), (324, 4, 1000, 134), (325, 4, 1000, 134)]
    return tags([*sizes, *places]) + bytes(8000)


def repeated_scans(count: int) -> bytes:
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last[:14] * count + b"\xff\xd9"


MEGABYTE = zlib.compress(bytes(1 << 20), 9)
ZEROS = zlib.compress(bytes(50_000_000), 9)

BOMBS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "pixels": (lambda: png(60_000, 60_000), "pixels"),
    "more pixels than Pillow warns about": (lambda: png(11_000, 11_000), r"more than 100000000 pixels"),
    "a line": (lambda: encoded(Image.new("L", (300_000, 1)), "PNG"), "300000 x 1 pixels: one side is more than 1000"),
    "a column": (lambda: encoded(Image.new("L", (1, 6000)), "PNG"), "1 x 6000 pixels: one side is more than 1000"),
    "nothing": (lambda: png(0, 5), None),
    "profile": (lambda: png(8, 8, chunk(b"iCCP", b"x\0\0" + ZEROS)), "too large"),
    "text": (lambda: png(8, 8, chunk(b"zTXt", b"x\0\0" + ZEROS)), "too large"),
    "exif as text": (lambda: png(8, 8, chunk(b"zTXt", b"Raw profile type exif\0\0" + ZEROS)), "too large"),
    "screen of an animation": (
        lambda: b"GIF89a" + b"\xff" * 4 + bytes(3) + encoded(Image.new("L", (1, 1)), "GIF")[13:],
        "pixels",
    ),
    "tiles": (tiled_tiff, "tiles of 65536 x 65536"),
    "scans": (lambda: repeated_scans(3000), "more than 100 scans in an image of 4096 pixels"),
    "chunks": (lambda: png(8, 8, chunk(b"tEXt", b"") * 200_000), "too many parts"),
    "empty chunks of pixels": (lambda: png(8, 8, chunk(b"IDAT", b"") * 150_000), "too many parts"),
    "profiles": (
        lambda: png(8, 8, chunk(b"iCCP", b"x\0\0" + MEGABYTE) * 5000),
        "more than 100 chunks of compressed text",
    ),
    "nameless text": (
        lambda: png(8, 8, chunk(b"zTXt", b"\0\0" + MEGABYTE) * 5000),
        "more than 100 chunks of compressed",
    ),
    "fractions": (lambda: png(8, 8, chunk(b"eXIf", rational_exif(1_000_000))), "more than 100000 numbers in its tags"),
    "fractions in a jpeg": (
        lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + rational_exif(400_000)[:60_000]) * 50),
        "more than 16 Exif segments",
    ),
    "fractions in a tiff": (
        lambda: tiff_with_exif(tags([(37386, 5, 1_000_000, 200)])[8:] + bytes(8_000_100)),
        "more than 100000 numbers in its tags",
    ),
    "strips": (lambda: strips(1_000_000), "more than 100000 numbers in its tags"),
    "tiles beyond the edge": (wide_tiles, "tiles of 99999984 x 1"),
    "tags": (
        lambda: b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 1 << 60) + struct.pack("<HHQQ", 9, 3, 1, 0) * 200_000,
        "more than 100000 tags",
    ),
    "tables": (lambda: jpeg_with(segment(0xDB, (b"\0" + bytes(64)) * 900) * 300), "more than 100 tables"),
    "frames": (
        lambda: jpeg_with(segment(0xC0, b"\x08\0\x40\0\x40\x01" + b"\1\x11\0" * 20_000) * 300),
        "more than 100 tables",
    ),
    "resources": (
        lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000) * 300),
        "more than 10000 Photoshop blocks",
    ),
    "junk": (lambda: jpeg_with(b"\xff\xfe\0\2" + bytes(20_000_000)), "too many parts"),
    "comments": (lambda: gif_with(b"!\xfe\1c\0" * 3_000_000), "too many parts"),
    "a comment of many blocks": (lambda: gif_with(b"!\xfe" + b"\1c" * 3_000_000 + b"\0"), "too many parts"),
    "zeros": (lambda: gif_with(bytes(20_000_000)), "too many parts"),
    "runs": (lambda: run_length_bmp(10_000, b"\1\1\0\0" * 10_000), "10000 x 10000 pixels is too large"),
    "plain comments": (lambda: b"P3 8 8 255\n" + b"#\n" * 500_000 + b"1 " * 192, "more than 10000 comments"),
    "plain numbers": (lambda: b"P2 9000 9000 255\n" + b" " * (1 << 26), "a plain Netpbm file of more than"),
    "items": (lambda: avif_with_items(40_000), "more than 65536 bytes of item descriptions"),
    "segments": (
        lambda: (whole := encoded(Image.new("L", (8, 8)), "JPEG"))[:2] + b"\xff\xfe\0\2" * 20_000 + whole[2:],
        "more than 10000 segments",
    ),
    "cut off": (lambda: png(9000, 9000), "truncated"),
    "cut off in strips": (lambda: encoded(Image.effect_noise((64, 64), 50), "TIFF")[:3000], None),
}


@mark.parametrize("kind", BOMBS)
def test_bombs_are_rejected_before_they_take_time(kind: str) -> None:
    make, reason = BOMBS[kind]
    stored = row(make())
    for read in (decode, Augmentation(TransformConfig(), InputConfig.resolve(CFG), "simplejpeg")):
        begin = time.process_time()
        with raises(UnreadableImageError, match=reason):
            read(stored)
        assert time.process_time() - begin < 2.0


def test_long_metadata_and_many_frames_take_no_more_memory_than_their_size() -> None:
    frames = [Image.new("L", (16, 16), i % 200) for i in range(300)]
    entries = [(tag, 7, 60_000, 8) for tag in range(1, 5000)]  # each refers to all of the data
    odd = [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP")]
    odd.append(png(8, 8, chunk(b"eXIf", tags(entries) + bytes(60_000))))
    for data in odd:
        tracemalloc.start()
        assert decode(row(data)).mode == "RGB"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10e6 + 4 * len(data)


def test_conversion_to_eight_bits_takes_at_most_four_bytes_per_pixel() -> None:
    wide = np.full((1500, 2000), 40_000, np.uint16)
    data = encoded(Image.fromarray(wide), "TIFF")
    tracemalloc.start()
    assert decode(row(data), "L").getextrema() == (155, 155)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * wide.size + (12 << 20)


def test_an_image_for_which_memory_runs_out_is_unreadable() -> None:
    for allocate in (lambda: np.empty(1 << 60, np.uint8), lambda: torch.empty(1 << 55, dtype=torch.uint8)):
        with raises(UnreadableImageError, match="not enough memory"), within_memory():
            allocate()
    with raises(RuntimeError, match="size of tensor"), within_memory():
        torch.ones(2) + torch.ones(3)


@mark.parametrize("size", [(300, 200), (31, 900), (8, 8), (1, 1), (900, 31)])
@mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_evaluation_pixels_are_bitwise_equal_to_timms(size: tuple[int, int], interpolation: str) -> None:
    config = CFG | {"interpolation": interpolation}
    image = Image.effect_noise(size, 90).convert("RGB")
    assert torch.equal(EvalTransform(InputConfig.resolve(config))(image), timms_transform(config)(image))


@mark.parametrize("size", [(1300, 31), (7, 3011), (5, 401), (3001, 3)])
@mark.parametrize(
    "target",
    [
        {},
        {"input_size": (3, 24, 40)},
        {"crop_mode": "squash"},
        {"crop_pct": 1.1},
        {"crop_mode": "squash", "crop_pct": 1.2},
    ],
)
def test_resizing_only_the_center_of_an_elongated_image_matches_timm(
    size: tuple[int, int], target: dict[str, object]
) -> None:
    config = CFG | target
    ramp = np.add.outer(np.arange(size[1]) * 7, np.arange(size[0]) * 3) % 256
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=2).astype(np.uint8))
    ours, timms = (
        EvalTransform(InputConfig.resolve(config))(image),
        timms_transform(config)(image),
    )
    assert ours.shape == timms.shape
    assert (ours - timms).abs().max() * 0.25 * 255 <= 1.01  # one step of 1/255: positions are rounded


@mark.parametrize("size", [(60, 2), (2, 60)])
def test_only_the_center_is_resized_at_a_large_input_size(size: tuple[int, int]) -> None:
    transform = EvalTransform(InputConfig.resolve(CFG | {"input_size": (3, 1024, 1024), "crop_pct": 0.5}))
    image = Image.effect_noise(size, 90).convert("RGB")
    transform(image)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    present = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (present + (256 << 20), limits[1]))  # resizing the whole image takes 504 MB
    try:
        assert transform(image).shape == (3, 1024, 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_an_elongated_image_that_would_be_resized_to_nothing_is_unreadable() -> None:
    transform = EvalTransform(InputConfig.resolve(CFG | {"crop_mode": "border"}))
    assert transform(Image.new("RGB", (900, 60))).shape == (3, 32, 32)
    with raises(UnreadableImageError, match="900 x 1 pixels would be resized to 36 x 0 for the model"):
        transform(Image.new("RGB", (900, 1)))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


def of_mode(mode: str, size: tuple[int, int] = (13, 9)) -> Image.Image:
    """Return seeded noise in a mode, converted through another mode if necessary."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "LAB":
        return Image.frombytes("LAB", size, noise.tobytes())
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, noise[:, :, :2].tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(
            noise[:, :, 0].astype(np.int32) * 257 if mode == "I" else noise[:, :, 0] / np.float32(255)
        )
    before = {"PA": "P", "RGBa": "RGBA"}.get(mode)
    return (image.convert(before) if before else image).convert(mode)


@mark.parametrize("mode", [*MODES, "I", "F", "I;16", "I;16B", "I;16L"])
def test_every_mode_of_every_format_is_decoded_or_unreadable(mode: str) -> None:
    decoded = 0
    for kind in FORMATS:
        try:
            data = encoded(of_mode(mode), kind)
        except (OSError, ValueError, KeyError):
            continue  # the format does not support this mode
        for wanted in ("RGB", "L"):
            with contextlib.suppress(UnreadableImageError), warnings.catch_warnings():
                warnings.simplefilter("error")
                image = decode(row(data), wanted)
                assert (image.mode, image.size) == (wanted, (13, 9))
                decoded += 1
    assert decoded >= 4


@mark.parametrize("mode", ["I;16", "I;16B", "F"])
def test_sixteen_bits_in_either_byte_order_and_floats_have_the_same_pixels(mode: str) -> None:
    values = np.array([[0, 257, 32896, 65535]])
    kinds = {"I;16": "<u2", "I;16B": ">u2", "F": "<f4"}
    stored = values / 65535 if mode == "F" else values
    image = Image.frombytes(mode, (4, 1), stored.astype(kinds[mode]).tobytes())
    found = np.asarray(decode(row(encoded(image, "TIFF")), "L")).tolist()
    assert found == [[0, 1, 128, 255]]


@mark.parametrize("white", [200, 65535])
def test_sixteen_bits_are_scaled_by_the_range_of_the_type_not_of_the_image(white: int) -> None:
    values = np.array([[0, white]], np.uint16)
    pgm = b"P5 2 1 65535\n" + values.astype(">u2").tobytes()
    for data in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF"), pgm):
        assert decode(row(data), "L").getextrema() in ((0, white // 257), (0, round(white / 257)))


def test_twelve_bits_and_inverted_grayscale_are_scaled_by_the_range_of_their_type() -> None:
    assert decode(row(grey_tiff(12, 1, b"\0\x0f\xff")), "L").getextrema() == (0, 255)
    assert np.asarray(decode(row(grey_tiff(16, 0, b"\0\0\xff\xff")), "L")).tolist() == [[255, 0]]
    assert np.asarray(decode(row(grey_tiff(16, 1, b"\0\0\xff\xff")), "L")).tolist() == [[0, 255]]


@mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 255]], np.float32), "floating-point pixels range from 0 to 255; expected 0 to 1"),
        (np.array([[-1, 1]], np.float32), "floating-point pixels range from -1 to 1; expected 0 to 1"),
        (np.array([[0, 200]], np.int32), "pixels is unknown; store 8-bit or 16-bit pixels"),
        (np.array([[0, 2**31 - 1]], np.int32), "pixels is unknown; store 8-bit or 16-bit pixels"),
    ],
)
def test_pixels_of_unknown_range_are_unreadable(values: np.ndarray, reason: str) -> None:
    with raises(UnreadableImageError, match=reason):
        decode(row(encoded(Image.fromarray(values), "TIFF")))


def test_pixels_that_are_not_finite_are_unreadable() -> None:
    for value in (np.nan, np.inf):
        with raises(UnreadableImageError, match="not finite"):
            decode(row(encoded(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")))


@mark.parametrize("filling", [b"\xff", b"\xff\x00", b"\xff\xd8", b"\xff\xd0"])
def test_a_jpeg_with_excessive_fill_bytes_is_rejected_quickly(filling: bytes) -> None:
    whole = encoded(Image.new("RGB", (40, 40)), "JPEG")
    begin = time.process_time()
    with raises(UnreadableImageError, match="segments besides the pixel data"):
        decode(row(whole[:2] + filling * 4_000_000 + whole[2:]))
    assert time.process_time() - begin < 1.0
    assert decode(row(whole[:2] + b"\xff" * 100 + whole[2:])).size == (40, 40)


@mark.parametrize("header", [b"P6\n" + b"#x\n" * 400_000, b"P6" + b" " * 1_000_000, b"P5 4 #" + b"x" * 1_000_000])
def test_a_netpbm_header_with_excessive_comments_is_rejected_quickly(header: bytes) -> None:
    with raises(UnreadableImageError, match="a header of more than 65536 bytes"):
        decode(row(header + b"\n4 4 255\n" + b"\0" * 48))
    assert decode(row(b"P6 # made by hand\n4 4\n# at noon\n255\n" + b"\0" * 70_000)).size == (4, 4)
    assert decode(row(b"P4 8 8\n" + b"\0" * 70_000)).size == (8, 8)


NETPBM: dict[str, tuple[bytes, list[object]]] = {
    "plain bits without whitespace": (b"P1\n# made by hand\n3 2\n010\n1 1 1", [[255, 0, 255], [0, 0, 0]]),
    "plain gray with comments": (b"P2 3 1 15\n0 # black\n7 15", [[0, 119, 255]]),
    "plain color of sixteen bits": (b"P3 1 1 65535 65535 32768 0", [[[255, 128, 0]]]),
    "bits": (b"P4 10 2\n\x80\x40\0\0", [[0, *[255] * 8, 0], [255] * 10]),
    "gray of twelve bits": (b"P5 3 1 4095\n\0\0\x08\0\x0f\xff", [[0, 128, 255]]),
    "dark gray of sixteen bits": (b"P5 2 1 65535\n\0\0\0\xff", [[0, 1]]),
    "gray of five bits": (b"P5 2 1 31\n\x1f\x10", [[255, 132]]),
    "color of ten bits": (b"P6 1 1 1023\n\3\xff\2\0\0\0", [[[255, 128, 0]]]),
    "a second image is ignored": (b"P5 1 1 255\n\x07P5 1 1 255\n\x08", [[7]]),
}


@mark.parametrize("kind", NETPBM)
def test_netpbm_is_scaled_by_maxval(kind: str) -> None:
    data, expected = NETPBM[kind]
    colour = isinstance(expected[0][0], list)
    assert np.asarray(decode(row(data), "RGB" if colour else "L")).tolist() == expected


@mark.parametrize("maxval", [1, 2, 7, 34, 100, 254, 255, 1023])
def test_netpbm_has_the_same_pixels_as_in_pillow(maxval: int) -> None:
    values = np.arange(min(maxval, 900) + 1, dtype=np.uint8 if maxval < 256 else ">u2").repeat(3)
    for data in (
        b"P6 %d 1 %d\n" % (len(values) // 3, maxval) + values.tobytes(),
        b"P3 %d 1 %d\n" % (len(values) // 3, maxval) + b" ".join(b"%d" % value for value in values),
    ):
        pillows = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(decode(row(data))), pillows)


@mark.parametrize(
    ("data", "reason"),
    [
        (b"P5 4 4 255\n" + bytes(15), "truncated: 15 of 16 bytes"),
        (b"P4 9 4\n" + bytes(7), "truncated: 7 of 8 bytes"),
        (b"P2 2 2 255\n1 2 3", "truncated: 3 of 4 numbers"),
        (b"P1 2 2\n101", "truncated: 3 of 4 numbers"),
        (b"P2 2 1 100\n1 101", "values range from 1 to 101; expected 0 to 100"),
        (b"P2 2 1 100\n1 -1", "values range from -1 to 1; expected 0 to 100"),
        (b"P1 2 1\n12", "values range from 1 to 2; expected 0 to 1"),
        (b"P5 2 1 100\n\1\xff", "values range from 1 to 255; expected 0 to 100"),
        (b"P5 2 1 0\n\0\0", "maxval=0 in its header; expected 1 to 65535"),
        (b"P6 2 1 65536\n\0\0", "maxval=65536 in its header; expected 1 to 65535"),
        (b"P5 0 1 255\n\0", "0 x 1 pixels"),
        (b"P5 99999 99999 255\n\0", "more than 100000000 pixels"),
        (b"P5 -1 1 255\n\0", "a damaged Netpbm header"),
        (b"P2 2 1 255\n", "truncated: 0 of 2 numbers"),
        (b"P2 2 1 255\n1 x", "some pixels are not integers"),
        (b"P3 1 1 255\n1 2 2.5", "some pixels are not integers"),
    ],
)
def test_damaged_netpbm_raises_an_error_with_the_reason(data: bytes, reason: str) -> None:
    with raises(UnreadableImageError, match=reason):
        decode(row(data))


def large(kind: str) -> bytes:
    """Return a legitimate image of 3 million pixels."""
    noise = Image.effect_noise((2000, 1500), 60)
    pixels = np.asarray(noise)
    if kind == "twelve bits":
        return b"P5 2000 1500 4095\n" + (pixels * np.uint16(16)).astype(">u2").tobytes()
    if kind == "plain":
        return b"P2 2000 1500 255\n" + b" ".join(map([b"%d" % i for i in range(256)].__getitem__, pixels.tobytes()))
    if kind == "one row a strip":
        return encoded(noise, "TIFF", tiffinfo={278: 1})
    if kind == "with a video after it":
        return encoded(noise, "JPEG") + random.Random(0).randbytes(20_000_000)
    raise ValueError(kind)


@mark.parametrize("kind", ["twelve bits", "plain", "one row a strip", "with a video after it"])
def test_large_legitimate_files_are_decoded_quickly(kind: str) -> None:
    data = large(kind)
    begin = time.process_time()
    assert decode(row(data)).size == (2000, 1500)
    assert time.process_time() - begin < 3.0


def test_a_run_length_encoded_bmp_of_common_size_is_decoded() -> None:
    line = b"\x40\1\0\4\1\2\3\4\x40\2\0\0"  # a run of 64 pixels, 4 literal pixels, a run of 64, end of line
    pixels = np.asarray(decode(row(run_length_bmp(132, line * 132 + b"\0\1")), "RGB"))[0, :, 0]
    assert pixels.tolist() == [1] * 64 + [1, 2, 3, 4] + [2] * 64
    assert decode(row(run_length_bmp(512, (b"\1\1" * 512 + b"\0\0") * 512))).size == (512, 512)  # runs of one pixel
    with raises(UnreadableImageError, match="too many parts"):
        decode(row(run_length_bmp(200, b"\0\2\0\0" * 200_000)))  # moves by zero pixels


@mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_an_avif_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.effect_noise((24, 16), 60).convert("RGB")
    data = encoded(image, "AVIF", exif=exif)
    assert np.array_equal(
        np.asarray(decode(row(data))), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    )


def test_an_avif_may_have_a_long_profile() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(300_000)
    assert decode(row(encoded(Image.new("RGB", (8, 8)), "AVIF", icc_profile=profile))).size == (8, 8)
    assert decode(row(avif_with_items(0))).size == (8, 8)


def test_a_git_lfs_pointer_raises_an_error_with_the_command_to_run() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    for read in (
        decode,
        Augmentation(TransformConfig(), InputConfig.resolve(CFG), "simplejpeg"),
        FastTransform(InputConfig.resolve(CFG)),
    ):
        with raises(UnreadableImageError, match="a Git LFS pointer instead of an image; run `git lfs pull`"):
            read(row(pointer))


@mark.parametrize("kind", FORMATS)
def test_damaged_files_of_every_format_are_decoded_or_unreadable(kind: str) -> None:
    draw = random.Random(kind)
    modes = {"AVIF": ["RGB"], "JPEG": ["RGB", "CMYK"], "PPM": ["1", "I"], "TIFF": ["LA", "I;16B", "CMYK"]}
    wholes = [encoded(of_mode(mode, (24, 20)), kind) for mode in modes.get(kind, ["RGB", "P"])]
    begin, readable = time.process_time(), 0
    for whole in wholes * 40:
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):  # mostly in headers
            damaged[draw.randrange(min(len(damaged), draw.choice([40, 400, 10**6])))] = draw.choice([0, 1, 127, 255])
        with contextlib.suppress(UnreadableImageError):
            assert decode(row(bytes(damaged[: draw.choice([None, len(damaged) // 2])]))).mode == "RGB"
            readable += 1
        if time.process_time() - begin > 3.0:
            raise AssertionError("damaged files take too long")
    assert readable < len(wholes) * 40
    assert readable > 0 or kind == "PNG"  # its checksums detect any damage
