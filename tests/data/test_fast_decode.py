"""The fast decoder agrees with Pillow on crops, on pixels within a tolerance, and on which images are unreadable."""

import dataclasses
import hashlib
import io
import itertools
import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytest import MonkeyPatch, fixture, mark, raises
from sklearn.datasets import load_sample_images
from support.processes import TINY
from timm.data import create_transform

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.batches import read_batches
from resnext_hub.data.config import DataConfig
from resnext_hub.data.decode import UnreadableImageError, decode
from resnext_hub.data.jpeg import FastTransform, Rectangle, decode_part, read_header, reduction
from resnext_hub.data.loaders import TrainingSamples, build_train_loader, seed_sample
from resnext_hub.data.order import Order, StepSampler
from resnext_hub.data.splits import load_splits
from resnext_hub.data.transforms import EvalTransform, TransformConfig, erase, normalize
from resnext_hub.models.input_config import InputConfig
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

CFG = {"input_size": (3, 64, 64), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.9}
MEAN, STD = (torch.tensor(CFG[name]).view(3, 1, 1) for name in ("mean", "std"))
PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
"""A temple and a flower, 640 x 427 pixels."""

SEEDS = range(25)

TOLERANCE = {"bilinear": (0.5, 2), "bicubic": (0.5, 16)}
"""Mean and maximum difference in steps of 1/255 when decoded at full size. Both decoders round (and, if bicubic, clip)
between two passes, whose order Pillow swaps if that is faster."""

REDUCED_MEAN = 5.0
"""Mean difference in steps of 1/255 when downscaled in decoding, whose filter is slightly sharper than resizing."""


def stored(image: Image.Image, kind: str = "JPEG", **options: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def turned(orientation: int, image: Image.Image = PHOTOGRAPHS[1]) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(image, exif=exif, quality=90)


def augmentation(decoder: str, interpolation: str = "bilinear", **options: object) -> Augmentation:
    return Augmentation(
        TransformConfig(**options), InputConfig.resolve(CFG | {"interpolation": interpolation}), decoder
    )


def difference(row: dict[str, object], seed: int, interpolation: str, size: int = 224) -> torch.Tensor:
    """Return the absolute difference of the pixels of both decoders for the same random numbers."""
    found = []
    for decoder in ("simplejpeg", "pil"):
        config = CFG | {"input_size": (3, size, size), "interpolation": interpolation}
        seed_sample(0, 0, seed)
        found.append(Augmentation(TransformConfig(), InputConfig.resolve(config), decoder)(row).image.int())
    return (found[0] - found[1]).abs().float()


@mark.parametrize("interpolation", ["bilinear", "bicubic"])
@mark.parametrize("subsampling", [0, 2])
@mark.parametrize("photograph", PHOTOGRAPHS)
def test_pixels_are_within_tolerance_at_full_size(
    photograph: Image.Image, subsampling: int, interpolation: str
) -> None:
    row = stored(photograph, subsampling=subsampling, quality=90)
    mean, most = TOLERANCE[interpolation]
    for seed in SEEDS:
        error = difference(row, seed, interpolation)
        assert error.mean() <= mean, seed
        assert error.max() <= most, seed


@mark.parametrize("interpolation", ["bilinear", "bicubic"])
@mark.parametrize("photograph", PHOTOGRAPHS)
def test_pixels_are_within_tolerance_when_downscaled_in_decoding(photograph: Image.Image, interpolation: str) -> None:
    large = photograph.resize((1931, 1283), Image.Resampling.LANCZOS)  # sides not divisible by any factor
    row = stored(large, quality=90)
    errors = [float(difference(row, seed, interpolation, size=96).mean()) for seed in SEEDS]
    assert max(errors) <= REDUCED_MEAN
    assert np.mean(errors) <= REDUCED_MEAN / 3


def test_downscaled_decoding_leaves_enough_pixels() -> None:
    for side, factor in ((223, 1), (447, 1), (448, 2), (895, 2), (896, 4), (1791, 4), (1792, 8), (9000, 8)):
        assert reduction((side, side), (224, 224)) == factor
        assert reduction((side, 9000), (224, 224)) == reduction((9000, side), (224, 224)) == factor


@mark.parametrize("orientation", range(1, 9))
@mark.parametrize("size", [224, 64])  # decoded at full size, and downscaled
def test_every_exif_orientation_is_applied(orientation: int, size: int) -> None:
    row = turned(orientation, PHOTOGRAPHS[1].crop((0, 0, 637, 421)))
    for seed in SEEDS[:6]:
        error = difference(row, seed, "bilinear", size)
        assert error.mean() <= (TOLERANCE["bilinear"][0] if size == 224 else REDUCED_MEAN), seed


@mark.parametrize("orientation", range(1, 9))
def test_a_downscaled_part_of_a_rotated_image_is_not_shifted(orientation: int) -> None:
    """A ramp reveals a shift by a pixel: a side of 8n + 1 pixels is rounded up by seven eighths of a pixel."""
    ramp = np.zeros((641, 641, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 250, 641)[:, None], np.linspace(0, 250, 641)[None]
    row = turned(orientation, Image.fromarray(ramp))
    part = Rectangle(64, 128, 512, 512)
    header = read_header(row["bytes"])
    fast = decode_part(row["bytes"], header, part, (64, 64), "bilinear", "RGB")
    whole = decode(row).resize((64, 64), Image.Resampling.BILINEAR, box=(128, 64, 640, 576))
    error = np.asarray(whole).astype(int) - fast.permute(1, 2, 0).numpy()
    assert np.abs(error).mean(axis=(0, 1)).max() < 0.8  # seven eighths of eight pixels would be 2.7


@mark.parametrize("size", [(64, 64), (16, 16)])  # decoded at full size, and downscaled
@mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 7}],
    ids=str,
)
@mark.parametrize("mode", ["RGB", "L"])
def test_a_part_has_the_same_pixels_as_in_the_whole_image(mode: str, options: dict, size: tuple[int, int]) -> None:
    data = stored(PHOTOGRAPHS[0].crop((0, 0, 333, 251)).convert(mode), quality=90, **options)["bytes"]
    header = read_header(data)
    whole = dataclasses.replace(header, rows_at=None)
    for top, height in itertools.product((0, 3, 90), (65, 66, 67, 129, 150, 161)):
        part = Rectangle(top, 11, height, 130)
        found, expected = (decode_part(data, h, part, size, "bicubic", "RGB") for h in (header, whole))
        assert torch.equal(found, expected), part


@mark.parametrize("size", [(64, 64), (16, 16)])
@mark.parametrize("subsampling", [0, 2])
def test_rows_below_a_part_are_not_decoded(subsampling: int, size: tuple[int, int]) -> None:
    for exif in (b"", turned(1)["bytes"]):
        options = {"exif": Image.open(io.BytesIO(exif)).getexif()} if exif else {}
        data = stored(PHOTOGRAPHS[0], quality=90, subsampling=subsampling, **options)["bytes"]
        damaged = bytearray(data)
        damaged[len(data) * 3 // 4 : -2] = b"\x55" * (len(data) - 2 - len(data) * 3 // 4)
        part = Rectangle(0, 50, 130, 150)
        found, expected = (
            decode_part(bytes(d), read_header(bytes(d)), part, size, "bicubic", "RGB") for d in (damaged, data)
        )
        assert torch.equal(found, expected)
        low = Rectangle(270, 50, 130, 150)
        with raises(AssertionError):
            torch.testing.assert_close(
                decode_part(bytes(damaged), read_header(bytes(damaged)), low, size, "bicubic", "RGB"),
                decode_part(data, read_header(data), low, size, "bicubic", "RGB"),
            )


KINDS = {
    "png": stored(PHOTOGRAPHS[0].crop((0, 0, 200, 150)), "PNG"),
    "webp": stored(PHOTOGRAPHS[0].crop((0, 0, 200, 150)), "WEBP"),
    "gif": stored(PHOTOGRAPHS[0].crop((0, 0, 200, 150)), "GIF"),
    "cmyk jpeg": stored(PHOTOGRAPHS[0].convert("CMYK")),
    "sixteen bits": stored(Image.fromarray(np.arange(40000, dtype=np.uint16).reshape(200, 200)), "PNG"),
}


@mark.parametrize("kind", KINDS)
def test_images_other_than_rgb_or_grayscale_jpegs_are_decoded_by_pillow(kind: str) -> None:
    for seed in SEEDS[:4]:
        assert difference(KINDS[kind], seed, "bicubic").max() == 0.0


@mark.parametrize("interpolation", ["nearest", "box", "hamming", "lanczos"])
def test_other_interpolations_are_left_to_pillow(interpolation: str) -> None:
    assert difference(stored(PHOTOGRAPHS[0]), 0, interpolation).max() == 0.0


def test_a_grayscale_jpeg_has_three_equal_channels_or_one() -> None:
    row = stored(PHOTOGRAPHS[0].convert("L"), quality=90)
    for seed in SEEDS[:6]:
        assert difference(row, seed, "bilinear").max() <= 1
    three = augmentation("simplejpeg")(row).image
    assert torch.equal(three[0], three[1])
    assert torch.equal(three[0], three[2])
    for image in (row, stored(PHOTOGRAPHS[0], quality=90)):  # a model with one channel accepts color images, too
        found = []
        for decoder in ("simplejpeg", "pil"):
            config = CFG | {"input_size": (1, 64, 64), "interpolation": "bilinear", "mean": (0.5,), "std": (0.5,)}
            seed_sample(0, 0, 1)
            found.append(
                Augmentation(TransformConfig(scale=(0.01, 0.02)), InputConfig.resolve(config), decoder)(
                    image
                ).image.int()
            )
        assert found[0].shape == (1, 64, 64)
        assert (found[0] - found[1]).abs().max() <= 2


def outcome(decoder: str, row: dict[str, object], seed: int = 0, **options: object) -> str | torch.Tensor:
    seed_sample(0, 0, seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata in readable images
            return augmentation(decoder, **options)(row).image.int()
    except UnreadableImageError as error:
        return str(error)


WHOLE = stored(PHOTOGRAPHS[1].crop((0, 0, 320, 240)), quality=85)["bytes"]
PROGRESSIVE = stored(PHOTOGRAPHS[1].crop((0, 0, 320, 240)), quality=85, progressive=True)["bytes"]


@mark.parametrize("whole", [WHOLE, PROGRESSIVE])
def test_truncated_files_are_unreadable_for_both_decoders_with_the_same_reason(whole: bytes) -> None:
    for length in (0, 1, 2, 300, 700, len(whole) // 2, len(whole) - 900, len(whole) - 3):
        row = {"bytes": whole[:length], "path": None}
        reason = outcome("pil", row)
        assert isinstance(reason, str) or length == len(whole) - 3, length
        found = outcome("simplejpeg", row)
        assert type(found) is type(reason), length
        assert found == reason if isinstance(reason, str) else torch.equal(found, reason)


@mark.parametrize("whole", [WHOLE, PROGRESSIVE])
def test_both_decoders_agree_on_damaged_files(whole: bytes) -> None:
    draw = random.Random(0)
    readable = 0
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        row = {"bytes": bytes(damaged[: draw.choice([None, None, draw.randrange(len(damaged))])]), "path": None}
        fast, slow = outcome("simplejpeg", row), outcome("pil", row)
        if isinstance(slow, str):
            assert fast == slow
        else:
            readable += 1
            assert (fast - slow).abs().float().mean() <= REDUCED_MEAN
    assert 20 < readable < 120


def test_both_decoders_agree_on_files_damaged_below_the_crop() -> None:
    """Mostly markers: Pillow rejects a file with an unexpected marker anywhere."""
    draw = random.Random(0)
    markers = [0xC0, 0xC4, 0xD0, 0xD3, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE1, 0xFE, 0xFF]
    verdicts = []
    for seed in range(150):
        damaged = bytearray(WHOLE)
        place = draw.randrange(len(WHOLE) // 2, len(WHOLE) - 2)
        if seed % 3:
            damaged[place : place + 2] = 0xFF, draw.choice(markers)
        else:
            del damaged[place : draw.randrange(place, len(WHOLE) - 2)]
        row = {"bytes": bytes(damaged), "path": None}
        fast, slow = (outcome(decoder, row, seed, scale=(0.05, 0.3)) for decoder in ("simplejpeg", "pil"))
        assert fast == slow if isinstance(slow, str) else isinstance(fast, torch.Tensor), seed
        verdicts.append(isinstance(slow, str))
    assert 20 < sum(verdicts) < 130


def test_bombs_and_missing_files_are_unreadable_for_both_decoders(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": None}, {"bytes": None, "path": str(tmp_path / "nowhere.jpg")}]
    scans = WHOLE[:-2] + WHOLE[WHOLE.index(b"\xff\xda") :][:14] * 200 + b"\xff\xd9"
    long = stored(Image.new("L", (1, 2000)))
    rows += [{"bytes": data, "path": None} for data in (b"not an image", scans)]
    for row in [*rows, long]:
        assert outcome("simplejpeg", row) == outcome("pil", row)
        assert isinstance(outcome("pil", row), str)
    for decoder in ("simplejpeg", "pil"):
        augment = Augmentation(
            TransformConfig(), InputConfig.resolve(CFG | {"interpolation": "bilinear"}), decoder, max_pixels=1000
        )
        with raises(UnreadableImageError, match=r"is more than 1000 pixels \(limit: max_image_pixels\)"):
            augment({"bytes": WHOLE, "path": None})


def test_a_path_and_its_bytes_have_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(WHOLE)
    for decoder in ("simplejpeg", "pil"):
        by_path = outcome(decoder, {"bytes": None, "path": str(tmp_path / "image.jpg")})
        assert torch.equal(by_path, outcome(decoder, {"bytes": WHOLE, "path": None}))


AUGMENTATIONS = {
    "nothing more": {},
    "randaugment": {"auto_augment": "rand-m7-mstd0.5"},
    "trivialaugment": {"auto_augment": "rand-n1-m10-mstd101-inc1"},
    "augmix": {"auto_augment": "augmix-m3-w2"},
    "three-augment": {"auto_augment": "3a", "color_jitter": 0.3},
    "autoaugment": {"auto_augment": "original"},
    "color jitter": {"color_jitter": 0.4},
    "erasing": {"random_erasing": 0.8},
    "everything": {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.6, "color_jitter": 0.2, "hflip": 0.3},
}


@mark.parametrize("name", AUGMENTATIONS)
@mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_pil_decoder_is_bitwise_equal_to_timms_transform(name: str, interpolation: str) -> None:
    options = AUGMENTATIONS[name]
    timms = create_transform(
        CFG["input_size"], is_training=True, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=interpolation,
        mean=CFG["mean"], std=CFG["std"], hflip=options.get("hflip", 0.5), auto_augment=options.get("auto_augment"),
        color_jitter=options.get("color_jitter"), re_prob=options.get("random_erasing", 0.0),
    )  # fmt: skip
    ours = augmentation("pil", interpolation, **options)
    row = stored(PHOTOGRAPHS[0].crop((0, 0, 300, 200)), "PNG")
    for seed in SEEDS[:12]:
        seed_sample(3, 1, seed)
        expected = timms(decode(row))
        seed_sample(3, 1, seed)
        image, erased = ours(row)
        assert image.dtype == torch.uint8
        batch = erase(normalize(image[None], MEAN, STD), torch.tensor([erased]))
        assert torch.equal(batch[0], expected), seed


@mark.parametrize("name", AUGMENTATIONS)
def test_both_decoders_draw_the_same_numbers_in_the_same_order(name: str) -> None:
    """The next random numbers show how many were drawn before; the crop and the erased rectangle are equal."""
    row = stored(PHOTOGRAPHS[1], quality=90)
    for seed in SEEDS[:8]:
        found = []
        for decoder in ("simplejpeg", "pil"):
            augment = augmentation(decoder, **AUGMENTATIONS[name])
            seed_sample(0, 0, seed)
            erased = augment(row).erased
            found.append((erased, random.random(), float(np.random.random()), float(torch.rand(1))))
        assert found[0] == found[1]


@fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of fourteen JPEGs each, larger than the input size, and one PNG."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name, photograph in zip(("temple", "flower"), PHOTOGRAPHS, strict=True):
        (root / name).mkdir()
        for index in range(14):
            left, top = (int(edge) for edge in rng.integers(0, 120, 2))
            photograph.crop((left, top, left + 400, top + 300)).save(root / name / f"{index:02d}.jpg", quality=88)
    PHOTOGRAPHS[0].crop((0, 0, 90, 80)).save(root / "temple" / "99.png")
    return root


@mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
def test_fast_pixels_are_the_same_for_any_number_of_processes_and_workers(photographs: Path) -> None:
    images = load_splits(DataConfig(dataset=str(photographs), eval_fraction=0.1)).train
    augment = augmentation("simplejpeg", "bicubic", random_erasing=0.5, color_jitter=0.2)
    found = set()
    for processes, workers in itertools.product((1, 2), (0, 2)):
        digests = [hashlib.sha256() for _ in range(4)]
        for process in range(processes):
            sampler = StepSampler(Order(len(images), 3), 12, 0, 4, process, processes)
            loader = build_train_loader(TrainingSamples(images, augment, seed=3), sampler, workers)
            for digest, batch in zip(digests, read_batches(loader), strict=True):
                assert batch.images.dtype == torch.uint8
                assert batch.images.is_contiguous(memory_format=torch.channels_last)
                for image, erased in zip(batch.images, batch.erased, strict=True):
                    digest.update(image.numpy().tobytes() + erased.numpy().tobytes())
        found.add(tuple(digest.hexdigest() for digest in digests))
    assert len(found) == 1


def pixels_of(run: Path) -> list[str]:
    return [json.loads(line)["pixels"] for line in (run / "samples-0.jsonl").read_text().splitlines()]


@fixture
def flags(photographs: Path) -> tuple[object, ...]:
    return (
        "train", *TINY, "--dataset", photographs, "--image-size", 64, "--batch-size", 6, "--lr", 1e-3, "--log-samples",
    )  # fmt: skip


@mark.slow
def test_the_decoder_is_recorded_kept_on_resume_and_changed_on_request(
    flags: tuple[object, ...], tmp_path: Path, command: Command
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert command(*flags, "--max-steps", 6, "--output-dir", whole)[0] == 0
    record = RunRecord.load(whole / "record.json")
    assert record.config["decoder"] == "simplejpeg"  # auto, if it is installed
    assert record.decoders == ["simplejpeg"]
    assert "simplejpeg" in record.versions
    assert "| decoder | simplejpeg |" in (whole / "model" / "README.md").read_text()

    assert command(*flags, "--max-steps", 3, "--output-dir", run)[0] == 0
    code, _, err = command(*flags, "--max-steps", 6, "--output-dir", run)
    assert code == 0, err
    assert "decoder:" not in err
    assert pixels_of(run) == pixels_of(whole)

    (tmp_path / "pil.yaml").write_text("decoder: pil\n")
    code, _, err = command(*flags, "--max-steps", 9, "--output-dir", run, "--config", tmp_path / "pil.yaml")
    assert code == 2
    assert "run were decoded with simplejpeg, but it would be resumed with pil" in err
    assert "--decoder pil" in err
    assert err.count("\n") == 1

    code, _, err = command(*flags, "--max-steps", 9, "--output-dir", run, "--decoder", "pil")
    assert code == 0, err
    assert "decoder: simplejpeg before the resume, pil now" in err
    record = RunRecord.load(run / "record.json")
    assert record.decoders == ["simplejpeg", "pil"]
    assert record.config["decoder"] == "pil"
    assert "were decoded with simplejpeg, then with pil." in (run / "model" / "README.md").read_text()


def test_without_simplejpeg_runs_use_pillow_and_a_simplejpeg_run_explains_how_to_resume(
    flags: tuple[object, ...], tmp_path: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    assert command(*flags, "--max-steps", 1, "--output-dir", tmp_path / "fast")[0] == 0
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it now raises ModuleNotFoundError
    assert command(*flags, "--max-steps", 1, "--output-dir", tmp_path / "slow")[0] == 0
    assert RunRecord.load(tmp_path / "slow" / "record.json").decoders == ["pil"]
    code, out, err = command(*flags, "--max-steps", 1, "--output-dir", tmp_path / "fast")
    assert (code, "is already finished" in out) == (0, True), err
    for words in (("--output-dir", tmp_path / "fast"), ("--output-dir", tmp_path / "new", "--decoder", "simplejpeg")):
        code, _, err = command(*flags, "--max-steps", 2, *words)
        assert code == 2
        assert "needs simplejpeg, which is not installed" in err
        assert "--decoder pil" in err
        assert err.count("\n") == 1


@mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_prediction_with_the_fast_decoder_is_within_tolerance(crop_mode: str) -> None:
    config = CFG | {"input_size": (3, 128, 128), "interpolation": "bicubic", "crop_mode": crop_mode}
    fast, slow = FastTransform(InputConfig.resolve(config)), EvalTransform(InputConfig.resolve(config))
    for row in (stored(PHOTOGRAPHS[0], quality=90), turned(6), stored(PHOTOGRAPHS[1].convert("L")), KINDS["png"]):
        error = (fast(row) - slow(decode(row))).abs() * STD * 255
        assert error.mean() <= REDUCED_MEAN
        if crop_mode == "border" or row is KINDS["png"]:
            assert error.max() == 0.0
    with raises(UnreadableImageError, match="not an image"):
        fast({"bytes": b"text", "path": None})
