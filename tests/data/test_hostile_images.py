"""Files that are meant to harm, or merely odd, are decoded or unreadable: in bounded time and memory, never else."""

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

import numpy as np
import torch
from PIL import Image
from pytest import fixture, mark, raises
from timm.data import create_transform

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.decode import FORMATS, UnreadablePictureError, decode, within_memory
from resnext_hub.data.jpeg import FastTransform
from resnext_hub.data.sources import PICTURE_SUFFIXES
from resnext_hub.data.transforms import TransformConfig, build_eval_transform

CFG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 0.875}


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
        ("dangling", "the file is gone"),
        ("loop", "Too many levels of symbolic links"),
        ("sparse", r"a file too large for 100000000 pixels \(--max-image-pixels\)"),
    ],
)
def test_only_regular_files_of_a_sensible_size_are_opened(name: str, reason: str, odd_paths: dict[str, Path]) -> None:
    stored = {"bytes": None, "path": str(odd_paths[name])}
    for reader in (decode, Augmentation(TransformConfig(), CFG, "simplejpeg"), FastTransform(CFG)):
        with raises(UnreadablePictureError, match=f"^{reason}$"):
            reader(stored)


def test_sockets_nulls_and_nuls_are_unreadable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        with raises(UnreadablePictureError, match="a socket"):
            decode({"bytes": None, "path": str(tmp_path / "s.jpg")})
    for stored in (None, {}, {"bytes": None, "path": None}, {"bytes": None, "path": "a\0b"}):
        with raises(UnreadablePictureError):
            decode(stored)


def test_only_the_formats_of_the_known_suffixes_are_opened() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in PICTURE_SUFFIXES if suffix in known} <= set(FORMATS)
    image, others = Image.new("RGB", (40, 40)), set()
    for kind in sorted(set(Image.SAVE) - set(FORMATS) - {"IM", "MPO"}):  # one warns, the other is a JPEG
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):  # what cannot be written here
            data = encoded(image, kind)
            others.add(kind)
            with raises(UnreadablePictureError, match="not an image"):
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


def tiled_tiff() -> bytes:
    """A TIFF of 16 x 16 pixels in tiles of 65536 x 65536."""
    sizes = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tags([*sizes, (322, 4, 1, 65536), (323, 4, 1, 65536), (324, 4, 1, 300), (325, 4, 1, 100)]) + bytes(400)


def repeated_scans(count: int) -> bytes:
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last[:14] * count + b"\xff\xd9"


ZEROS = zlib.compress(bytes(50_000_000), 9)

BOMBS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "pixels": (lambda: png(60_000, 60_000), "pixels"),
    "more pixels than Pillow warns of": (lambda: png(11_000, 11_000), r"more than 100000000 pixels"),
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
    "scans": (lambda: repeated_scans(3000), "scans of 4096 pixels, more than 100"),
    "chunks": (lambda: png(8, 8, chunk(b"tEXt", b"") * 20_000), "more than 10000 parts"),
    "segments": (
        lambda: (whole := encoded(Image.new("L", (8, 8)), "JPEG"))[:2] + b"\xff\xfe\0\2" * 20_000 + whole[2:],
        "more than 10000 parts",
    ),
    "cut off": (lambda: png(9000, 9000), "truncated"),
    "cut off in strips": (lambda: encoded(Image.effect_noise((64, 64), 50), "TIFF")[:3000], None),
}


@mark.parametrize("kind", BOMBS)
def test_bombs_are_unreadable_before_they_cost_anything(kind: str) -> None:
    make, reason = BOMBS[kind]
    stored = row(make())
    for reader in (decode, Augmentation(TransformConfig(), CFG, "simplejpeg")):
        begin = time.process_time()
        with raises(UnreadablePictureError, match=reason):
            reader(stored)
        assert time.process_time() - begin < 2.0


def test_long_metadata_and_many_frames_cost_no_more_than_their_bytes() -> None:
    frames = [Image.new("L", (16, 16), i % 200) for i in range(300)]
    entries = [(tag, 7, 60_000, 8) for tag in range(1, 5000)]  # each claims the whole of it
    odd = [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP")]
    odd.append(png(8, 8, chunk(b"eXIf", tags(entries) + bytes(60_000))))
    for data in odd:
        tracemalloc.start()
        assert decode(row(data)).mode == "RGB"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10e6 + 4 * len(data)


def test_depth_is_reduced_within_four_bytes_a_pixel() -> None:
    wide = np.full((1500, 2000), 40_000, np.uint16)
    data = encoded(Image.fromarray(wide), "TIFF")
    tracemalloc.start()
    assert decode(row(data), "L").getextrema() == (155, 155)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * wide.size + (12 << 20)


def test_what_memory_does_not_suffice_for_is_unreadable() -> None:
    for allocate in (lambda: np.empty(1 << 60, np.uint8), lambda: torch.empty(1 << 55, dtype=torch.uint8)):
        with raises(UnreadablePictureError, match="not enough memory"), within_memory():
            allocate()
    with raises(RuntimeError, match="size of tensor"), within_memory():
        torch.ones(2) + torch.ones(3)


@mark.parametrize("size", [(300, 200), (31, 900), (8, 8), (1, 1), (900, 31)])
@mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_evaluation_pixels_are_timms_to_the_bit(size: tuple[int, int], interpolation: str) -> None:
    config = CFG | {"interpolation": interpolation}
    image = Image.effect_noise(size, 90).convert("RGB")
    assert torch.equal(build_eval_transform(config)(image), create_transform(**config, is_training=False)(image))


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
def test_of_a_very_long_image_the_centre_alone_is_resized_as_timm_does(
    size: tuple[int, int], target: dict[str, object]
) -> None:
    config = CFG | target
    ramp = np.add.outer(np.arange(size[1]) * 7, np.arange(size[0]) * 3) % 256
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=2).astype(np.uint8))
    ours, timms = build_eval_transform(config)(image), create_transform(**config, is_training=False)(image)
    assert ours.shape == timms.shape
    assert (ours - timms).abs().max() * 0.25 * 255 <= 1.01  # a step of 255: the rounding of a position


@mark.parametrize("size", [(60, 2), (2, 60)])
def test_at_a_large_input_size_the_centre_alone_is_resized(size: tuple[int, int]) -> None:
    transform = build_eval_transform(CFG | {"input_size": (3, 1024, 1024), "crop_pct": 0.5})
    image = Image.effect_noise(size, 90).convert("RGB")
    transform(image)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    present = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (present + (256 << 20), limits[1]))  # all of it takes 504 MB
    try:
        assert transform(image).shape == (3, 1024, 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_very_long_image_that_nothing_is_left_of_is_unreadable() -> None:
    transform = build_eval_transform(CFG | {"crop_mode": "border"})
    assert transform(Image.new("RGB", (900, 60))).shape == (3, 32, 32)
    with raises(UnreadablePictureError, match="900 x 1 pixels leave nothing"):
        transform(Image.new("RGB", (900, 1)))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


def of_mode(mode: str, size: tuple[int, int] = (13, 9)) -> Image.Image:
    """Return seeded noise in a mode, where need be by the mode that converts to it."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "LAB":
        return Image.frombytes("LAB", size, noise.tobytes())
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, noise[:, :, :2].tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(noise[:, :, 0].astype(np.int32 if mode == "I" else np.float32) * 300)
    before = {"PA": "P", "RGBa": "RGBA"}.get(mode)
    return (image.convert(before) if before else image).convert(mode)


@mark.parametrize("mode", [*MODES, "I", "F", "I;16", "I;16B", "I;16L"])
def test_every_mode_of_every_format_is_decoded_or_unreadable(mode: str) -> None:
    decoded = 0
    for kind in FORMATS:
        try:
            data = encoded(of_mode(mode), kind)
        except (OSError, ValueError, KeyError):
            continue  # a mode that this format does not have
        for wanted in ("RGB", "L"):
            with contextlib.suppress(UnreadablePictureError), warnings.catch_warnings():
                warnings.simplefilter("error")
                image = decode(row(data), wanted)
                assert (image.mode, image.size) == (wanted, (13, 9))
                decoded += 1
    assert decoded >= 4


@mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_sixteen_bits_of_any_byte_order_have_the_same_pixels(mode: str) -> None:
    values = np.array([[0, 257, 32896, 65535]])
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    stored = values / 65535 if mode == "F" else values
    image = Image.frombytes(mode, (4, 1), stored.astype(kinds[mode]).tobytes())
    found = np.asarray(decode(row(encoded(image, "TIFF")), "L")).tolist()
    assert found == [[0, 1, 128, 255]]


def test_pixels_that_are_no_numbers_are_unreadable() -> None:
    for value in (np.nan, np.inf):
        with raises(UnreadablePictureError, match="not finite"):
            decode(row(encoded(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")))


@mark.parametrize("filling", [b"\xff", b"\xff\x00", b"\xff\xd8", b"\xff\xd0"])
def test_a_jpeg_of_endless_filling_is_refused_before_it_costs_time(filling: bytes) -> None:
    whole = encoded(Image.new("RGB", (40, 40)), "JPEG")
    begin = time.process_time()
    with raises(UnreadablePictureError, match="parts beside its pixels"):
        decode(row(whole[:2] + filling * 4_000_000 + whole[2:]))
    assert time.process_time() - begin < 1.0
    assert decode(row(whole[:2] + b"\xff" * 100 + whole[2:])).size == (40, 40)


@mark.parametrize("header", [b"P6\n" + b"#x\n" * 400_000, b"P6" + b" " * 1_000_000, b"P5 4 #" + b"x" * 1_000_000])
def test_a_header_of_endless_comments_is_refused_before_it_costs_time(header: bytes) -> None:
    with raises(UnreadablePictureError, match="a header of more than 65536 bytes"):
        decode(row(header + b"\n4 4 255\n" + b"\0" * 48))
    assert decode(row(b"P6 # made by hand\n4 4\n# at noon\n255\n" + b"\0" * 70_000)).size == (4, 4)
    assert decode(row(b"P4 8 8\n" + b"\0" * 70_000)).size == (8, 8)


@mark.parametrize("kind", FORMATS)
def test_damaged_files_of_every_format_are_decoded_or_unreadable(kind: str) -> None:
    draw = random.Random(kind)
    modes = {"AVIF": ["RGB"], "JPEG": ["RGB", "CMYK"], "PPM": ["1", "I"], "TIFF": ["LA", "I;16B", "CMYK"]}
    wholes = [encoded(of_mode(mode, (24, 20)), kind) for mode in modes.get(kind, ["RGB", "P"])]
    begin, readable = time.process_time(), 0
    for whole in wholes * 40:
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):  # headers more than pixels
            damaged[draw.randrange(min(len(damaged), draw.choice([40, 400, 10**6])))] = draw.choice([0, 1, 127, 255])
        with contextlib.suppress(UnreadablePictureError):
            assert decode(row(bytes(damaged[: draw.choice([None, len(damaged) // 2])]))).mode == "RGB"
            readable += 1
        if time.process_time() - begin > 3.0:
            raise AssertionError("damaged files take too long")
    assert readable < len(wholes) * 40
    assert readable > 0 or kind == "PNG"  # whose checksums find every damage
