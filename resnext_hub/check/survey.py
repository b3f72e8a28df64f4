"""Decode every image of a dataset once and note what the checks need: size, mode, digest, hash and thumbnail."""

import hashlib
import logging
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from resnext_hub.data.batches import defer_stop_signals, read_items
from resnext_hub.data.config import NO_TEST, DataConfig
from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, opened, read_bytes, upright
from resnext_hub.data.exclude import Entry, read_exclusions
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, setting
from resnext_hub.machine import cores
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

THUMBNAIL = 16
"""Width and height of thumbnails in pixels."""

_HASHED = 32
"""Width and height that images are reduced to before hashing, as imagehash.phash does."""

_SERIAL = 200
"""Number of images up to which starting workers would take longer than they save."""

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about one image."""

    split: str
    index: int
    """Its index among the images of the split that are used."""
    row: int
    """Its row in the split as it is stored."""
    name: str
    label: int
    digest: bytes = b""
    """SHA-256 of the encoded image."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, upright; None if it is unreadable."""
    mode: str = ""
    """Its mode in Pillow's terms before conversion, such as RGB, L or P."""
    blank: bool = False
    """Whether all pixels have the same color."""
    reason: str | None = None
    """Why it is unreadable."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """The images of all splits, in the order of `images`."""

    label_names: tuple[str, ...]
    splits: dict[str, IndexedImages]
    """The images of each split; one that was held out is called `held out`."""
    stored: dict[str, str]
    """The split that the images of each of `splits` are stored in."""
    source_digest: str
    """Identifies the rows of the dataset as it is stored."""
    excluded: tuple[Entry, ...]
    """Images that were left out."""
    images: tuple[Facts, ...]
    hashes: np.ndarray
    """Perceptual hashes of each image and of its mirror image, `(N, 2)` uint64."""
    thumbnails: np.ndarray
    """Thumbnails, `(N, 16, 16, 3)` uint8."""

    @property
    def comparable(self) -> np.ndarray:
        """Indices of the images that can be compared: readable ones that are not of a single color."""
        return np.array([i for i, facts in enumerate(self.images) if facts.size and not facts.blank], dtype=np.int64)


HELD_OUT = {"evaluation": "held out", "test": "held out for a test"}
"""Names of parts of the training split that are held out."""


def survey(config: DataConfig, workers: int | None = None) -> Survey:
    """Decode every image of every split of a dataset.

    Args:
        config: The dataset.
        workers: Number of processes; one per core if not given, and none for few images.

    Raises:
        RequestError: If the dataset cannot be opened, or is a stream.
        RunError: If reading fails.
    """
    if config.streaming:
        raise RequestError(f"{setting('streaming', True)}: a stream cannot be checked; omit this setting")
    loaded, splits, label_names = _all_splits(config)
    total = sum(map(len, splits.values()))
    _logger.info("%s: reading %d images", printable(config.dataset), total)
    if workers is None:
        workers = cores() if total > _SERIAL else 0
    read = list(_read(splits, workers))
    return Survey(
        label_names=label_names,
        splits=splits,
        stored={name: name if name in loaded.stored else str(loaded.found.train_split) for name in splits},
        source_digest=str(loaded.source_digest),
        excluded=read_exclusions(config.exclude).entries,
        images=tuple(facts for facts, _, _ in read),
        hashes=np.array([hashes for _, hashes, _ in read], dtype=np.uint64).reshape(len(read), 2),
        thumbnails=np.stack([thumbnail for _, _, thumbnail in read]),
    )


def _all_splits(config: DataConfig) -> tuple[Splits, dict[str, IndexedImages], tuple[str, ...]]:
    """Return the splits that training would use, the images of these and of all others, and all class names."""
    loaded = load_splits(config)
    found = loaded.found
    assert isinstance(loaded.train, IndexedImages)
    splits = {str(found.train_split): loaded.train}
    for part, images in loaded.evaluated.items():
        assert isinstance(images, IndexedImages)
        splits[loaded.stored_in(part) or _unused(HELD_OUT[part], loaded.stored)] = images
    names = list(loaded.label_names)
    for split in loaded.stored:
        if split in splits:
            continue
        try:
            other = load_splits(replace(found, eval_split=split, test_split=NO_TEST, test_fraction=0.0))
        except RequestError as error:
            _logger.warning("the split %s is not checked: %s", printable(split), error)
            continue
        names += [name for name in other.label_names if name not in names]
        number = np.array([names.index(name) for name in other.label_names])
        assert isinstance(other.eval, IndexedImages)
        splits[split] = replace(other.eval, labels=number[other.eval.labels])
    return loaded, splits, tuple(names)


def _unused(name: str, others: Container[str]) -> str:
    return name if name not in others else f"{name} by training"


class _Surveyed(Dataset[Any]):
    """Facts, hashes and thumbnail of each image, by its place in all splits."""

    def __init__(self, splits: dict[str, IndexedImages]) -> None:
        self.splits = splits
        self.places = [(name, index) for name, images in splits.items() for index in range(len(images))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> tuple[Facts, tuple[int, int], np.ndarray]:
        name, index = self.places[place]
        images = self.splits[name]
        facts = Facts(
            split=name,
            index=index,
            row=int(images.indices[index]),
            name=images.name(index),
            label=int(images.labels[index]),
        )
        return _examine(facts, images)


def _examine(facts: Facts, images: IndexedImages) -> tuple[Facts, tuple[int, int], np.ndarray]:
    import imagehash

    try:
        data = read_bytes(images.row(facts.index), MAX_IMAGE_PIXELS)
        facts = replace(facts, digest=hashlib.sha256(data).digest())
        with opened(data) as image:
            mode = image.mode
            decoded = upright(image, "RGB")
    except UnreadableImageError as error:
        return replace(facts, reason=str(error)), (0, 0), np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    small = decoded.resize((_HASHED, _HASHED), Image.Resampling.LANCZOS, reducing_gap=3.0)
    gray = small.convert("L")
    hashes = [int(str(imagehash.phash(view)), 16) for view in (gray, ImageOps.mirror(gray))]
    blank = decoded.getcolors(maxcolors=1) is not None
    thumbnail = np.asarray(small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return replace(facts, size=decoded.size, mode=mode, blank=blank), (hashes[0], hashes[1]), thumbnail


def _read(splits: dict[str, IndexedImages], workers: int) -> Iterator[tuple[Facts, tuple[int, int], np.ndarray]]:
    loader: DataLoader[Any] = DataLoader(
        _Surveyed(splits),
        batch_size=_BATCH,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=defer_stop_signals if workers else None,
    )
    for batch in read_items(loader):
        yield from batch


def _unchanged(items: Sequence[Any]) -> Sequence[Any]:
    return items
