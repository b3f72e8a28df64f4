"""Throughput of data loading, from encoded images to training batches, against a baseline."""

import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from resnext_hub.benchmark.comparison import Comparison, Entry, compare
from resnext_hub.data.augment import Augmentation
from resnext_hub.data.batches import read_batches
from resnext_hub.data.decode import UnreadableImageError, decode, read_bytes
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.jpeg import is_installed
from resnext_hub.data.loaders import WORKERS, TrainingSamples, build_train_loader, seed_sample
from resnext_hub.data.order import Order, StepSampler
from resnext_hub.data.sources import list_images
from resnext_hub.data.transforms import IMAGE_SIZE, TransformConfig, normalize
from resnext_hub.errors import RequestError, setting
from resnext_hub.models.input_config import InputConfig
from resnext_hub.settings import Range, check_fields

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)

SIZES = {"500x375": (500, 375), "12mp": (4000, 3000)}
"""Width and height of the images, by name of the size."""

COUNTS = {"500x375": (96, 768), "12mp": (8, 32)}
"""Number of distinct images, and number of images read per round."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DRAWS = 4
"""Random crops per image on which pixels are compared."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Data-loading benchmark."""

    image_size: Annotated[int, Range(1, IMAGE_SIZE)] = 224
    """Height and width of the model's input, in pixels."""
    workers: Annotated[int, Range(0, WORKERS)] = 1
    """Number of data-loading workers, 0 to 256."""
    batch_size: Annotated[int, Range(1, 1 << 20)] = 16
    """Images per batch."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation for resizing."""
    photo_size: Literal["500x375", "12mp"] = "500x375"
    """Size of the source images: 500x375, typical of ImageNet, or 12mp (12 megapixels), typical of a phone. The images
    are crops of two photos from scikit-learn."""
    images: str | None = None
    """Folder of images to use instead of these photos; unreadable images are skipped."""

    def __post_init__(self) -> None:
        check_fields(self)


def measure(settings: Settings, rounds: int) -> Comparison:
    """Measure all entries.

    This process uses one thread: it normalizes our batches, and more threads would compete with the workers for cores.

    Raises:
        RequestError: If the folder has no readable images.
    """
    torch.set_num_threads(1)
    stored, count = _stored_images(settings)
    rows = _table(stored, count)
    size = (3, settings.image_size, settings.image_size)
    input = InputConfig(
        input_size=size,
        interpolation=settings.interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=1.0,
        crop_mode="center",
    )
    transform = _timm_transform(input)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def ours(decoder: str) -> Entry:
        augment = Augmentation(TransformConfig(), input, decoder)

        def batches() -> Iterable[torch.Tensor]:
            loader = _our_loader(settings, rows, augment)
            return (normalize(batch.images, mean, std) for batch in read_batches(loader))

        def pixels(row: dict[str, Any]) -> torch.Tensor:
            return normalize(augment(row).image[None], mean, std)[0]

        return Entry(
            name=f"resnext-hub, {decoder}",
            run=lambda: _rate(batches(), settings.batch_size),
            quality=_compare(stored, pixels, lambda row: _reference(row, transform), std),
            ours=True,
        )

    baseline = Entry(
        name="datasets, PIL, timm's transform",
        run=lambda: _rate(_baseline_batches(settings, rows, transform), settings.batch_size),
        quality="reference",
    )
    decoders = ["simplejpeg", "pil"] if is_installed() else ["pil"]
    megabytes = sum(map(len, stored)) / len(stored) / 1e6
    return compare(
        "loader",
        dataclasses.asdict(settings),
        [*map(ours, decoders), baseline],
        rounds,
        torch.device("cpu"),
        notes=(f"{len(stored)} images of {megabytes:.2f} MB on average, {count} read per round.",),
    )


def _stored_images(settings: Settings) -> tuple[list[bytes], int]:
    """Return encoded images, and the number of images to read per round."""
    if settings.images is None:
        number, count = COUNTS[settings.photo_size]
        return _photographs(SIZES[settings.photo_size], number), count
    folder = Path(settings.images)
    paths = list_images(folder) if folder.is_dir() else []
    if not paths:
        raise RequestError(f"{setting('images', folder)}: expected a folder with images")
    stored = []
    for path in paths:
        try:
            data = read_bytes({"bytes": None, "path": path})
            decode({"bytes": data, "path": None})
        except UnreadableImageError as error:
            _logger.warning("skipping unreadable image %s: %s", path, error)
        else:
            stored.append(data)
    if not stored:
        raise RequestError(f"{setting('images', folder)}: all {len(paths)} images are unreadable")
    with Image.open(io.BytesIO(stored[0])) as first:
        return stored, COUNTS["12mp" if first.width * first.height > 2e6 else "500x375"][1]


def _photographs(size: tuple[int, int], number: int) -> list[bytes]:
    """Return JPEGs of varying quality: random crops of two photos, enlarged to `size`."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    stored = []
    for index in range(number):
        photo = photos[index % len(photos)]
        width, height = 500, 375
        left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
        crop = photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        if size != (width, height):  # an enlarged crop is smoother, and so faster to decode, than a camera image
            grain = rng.integers(-4, 5, (size[1], size[0], 1), dtype=np.int16)
            crop = Image.fromarray(np.clip(np.asarray(crop) + grain, 0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
        stored.append(buffer.getvalue())
    return stored


def _table(stored: list[bytes], count: int) -> "datasets.Dataset":
    """Return the images, repeated to at least `count` rows, as a dataset in memory."""
    import datasets

    repeated = [{"bytes": stored[i % len(stored)], "path": None} for i in range(max(count, len(stored)))]
    return datasets.Dataset.from_dict({"image": repeated}, features=datasets.Features({"image": datasets.Image()}))


def _timm_transform(input: InputConfig) -> Callable[[Image.Image], torch.Tensor]:
    from timm.data import create_transform

    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        input_size=input.input_size,
        interpolation=input.interpolation,
        mean=input.mean,
        std=input.std,
        is_training=True,
        color_jitter=None,
    )
    return transform


def _our_loader(settings: Settings, rows: "datasets.Dataset", augment: Augmentation) -> DataLoader[Any]:
    import datasets

    count = len(rows)
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    images = IndexedImages(undecoded, "image", np.arange(count), np.zeros(count, dtype=np.int64))
    sampler = StepSampler(Order(count, 0), settings.batch_size, 0, _steps(settings, count))
    return build_train_loader(TrainingSamples(images, augment, 0), sampler, settings.workers)


def _baseline_batches(
    settings: Settings, rows: "datasets.Dataset", transform: Callable[[Image.Image], torch.Tensor]
) -> Iterable[torch.Tensor]:
    def transformed(batch: dict[str, list[Image.Image]]) -> dict[str, list[torch.Tensor]]:
        return {"image": [transform(image.convert("RGB")) for image in batch["image"]]}

    count = _steps(settings, len(rows)) * settings.batch_size
    sampler = torch.utils.data.RandomSampler(rows, num_samples=count, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        rows.with_transform(transformed),
        batch_size=settings.batch_size,
        sampler=sampler,
        num_workers=settings.workers,
    )
    return (batch["image"] for batch in loader)


def _steps(settings: Settings, count: int) -> int:
    return max(count // settings.batch_size, 1) + 1  # the first batch starts the clock


def _rate(batches: Iterable[torch.Tensor], batch_size: int) -> float:
    """Return images/s counted from the first batch, which excludes the startup of the workers."""
    steps, begin = -1, 0.0
    for steps, _ in enumerate(batches):  # noqa: B007 - the last one counts them
        begin = begin or time.perf_counter()
    return steps * batch_size / (time.perf_counter() - begin)


def _reference(row: dict[str, Any], transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    with Image.open(io.BytesIO(row["bytes"])) as image:
        return transform(image.convert("RGB"))


def _compare(
    stored: list[bytes],
    pixels: Callable[[dict[str, Any]], torch.Tensor],
    reference: Callable[[dict[str, Any]], torch.Tensor],
    std: torch.Tensor,
) -> str:
    """Return a phrase for the error of pixels with the same random crops, in steps of 1/255."""
    means, greatest = [], 0.0
    for index, data in enumerate(stored[:16]):
        for draw in range(DRAWS):
            results = []
            for load in (pixels, reference):
                seed_sample(0, draw, index)
                results.append(load({"bytes": data, "path": None}))
            error = (results[0] - results[1]).abs() * std * 255
            means.append(float(error.mean()))
            greatest = max(greatest, float(error.max()))
    if greatest == 0.0:
        return "identical pixels"
    return f"pixel error {np.mean(means):.2f}/255 on average, at most {greatest:.0f}/255"
