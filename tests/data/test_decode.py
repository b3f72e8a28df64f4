"""Every kind of image decodes to known pixels, or raises an error with the reason."""

import contextlib
import io
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pytest import MonkeyPatch, mark, raises

from resnext_hub.data.decode import UnreadableImageError, decode


def encoded(image: Image.Image, kind: str, **options: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(row: dict[str, object], mode: str = "RGB") -> list[object]:
    return np.asarray(decode(row, mode)).tolist()


def rotated() -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    return encoded(image, "PNG", exif=exif)


def transparent_palette() -> dict[str, object]:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return encoded(image, "PNG", transparency=b"\x00\xff")


def animated() -> dict[str, object]:
    frames = [Image.new("RGB", (1, 1), color) for color in ("blue", "red")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bits() -> dict[str, object]:
    return encoded(Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)), "PNG")


KINDS: dict[str, tuple[Callable[[], dict[str, object]], list[object]]] = {
    "gray": (lambda: encoded(Image.new("L", (2, 1), 77), "PNG"), [[[77] * 3] * 2]),
    "one pixel": (lambda: encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), [[[1, 2, 3]]]),
    "sixteen bits are scaled": (sixteen_bits, [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]),
    "sixteen bits in a tiff": (
        lambda: encoded(Image.fromarray(np.array([[65535, 0]], np.uint16)), "TIFF"),
        [[[255] * 3, [0] * 3]],
    ),
    "transparency is dropped": (
        lambda: encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG"),
        [[[9, 8, 7]]],
    ),
    "gray with transparency": (lambda: encoded(Image.new("LA", (1, 1), (60, 5)), "PNG"), [[[60] * 3]]),
    "palette with transparency": (transparent_palette, [[[10, 20, 30], [200, 100, 50]]]),
    "exif orientation": (rotated, [[[255, 0, 0]], [[0, 0, 0]]]),
    "the first frame of an animation": (animated, [[[0, 0, 255]]]),
    "cmyk": (lambda: encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [[[0, 255, 255]]]),
    "black and white": (lambda: encoded(Image.new("1", (1, 1), 1), "PNG"), [[[255] * 3]]),
}


@mark.parametrize("kind", KINDS)
def test_unusual_images_decode_to_known_pixels(kind: str) -> None:
    make, expected = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(make()) == expected


@mark.parametrize("orientation", range(10))
@mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation_is_applied_as_in_pillow(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    row = encoded(Image.effect_noise((7, 5), 90).convert("RGB"), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(row["bytes"])))
    assert pixels(row) == np.asarray(expected).tolist()


def test_exif_that_pillow_can_read_but_not_write_is_no_problem() -> None:
    """The resolution is text instead of a fraction; the orientation, which has to be applied, is valid."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 3, b"72")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    row = encoded(Image.effect_noise((8, 16), 50).convert("RGB"), "JPEG", exif=exif)
    assert decode(row).size == (16, 8)


def test_a_path_and_its_bytes_decode_to_the_same_pixels(tmp_path: Path) -> None:
    row = sixteen_bits()
    (tmp_path / "image.png").write_bytes(row["bytes"])
    assert pixels({"bytes": None, "path": str(tmp_path / "image.png")}) == pixels(row)
    assert pixels(row, "L") == [[0, 1, 128, 255]]


def test_a_cmyk_jpeg_keeps_its_colors() -> None:
    red, green, blue = pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))[4][4]
    assert red > 240
    assert max(green, blue) < 15


@mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"this is not an image", "not an image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")["bytes"][:700], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")["bytes"][:700], "truncated"),
        (None, "neither bytes nor a path"),
    ],
)
def test_unreadable_images_raise_an_error_with_the_reason(data: bytes | None, reason: str) -> None:
    with raises(UnreadableImageError, match=reason):
        decode({"bytes": data, "path": None})


def test_the_pixel_limit_is_checked_by_the_header_alone(monkeypatch: MonkeyPatch) -> None:
    with raises(UnreadableImageError, match=r"40 x 40 is more than 1000 pixels \(limit: max_image_pixels\)"):
        decode(encoded(Image.new("RGB", (40, 40)), "PNG"), max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above it, Pillow warns; above twice as many, it raises
    for size in (30, 40, 60):
        assert decode(encoded(Image.new("RGB", (size, size)), "PNG"), max_pixels=3600).size == (size, size)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with raises(UnreadableImageError, match="the file does not exist"):
        decode({"bytes": None, "path": str(tmp_path / "nowhere.png")})


@mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_files_are_decoded_or_unreadable(kind: str) -> None:
    draw = random.Random(0)
    whole = encoded(Image.effect_noise((32, 24), 60).convert("RGB"), kind)["bytes"]
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        row = {"bytes": bytes(damaged[: draw.choice([None, len(damaged) // 2])]), "path": None}
        with warnings.catch_warnings(), contextlib.suppress(UnreadableImageError):
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata in readable images
            assert decode(row).mode == "RGB"
