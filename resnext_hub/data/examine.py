"""Decode every image of some splits once and note what comparing them needs: size, mode, digest, hash and thumbnail."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from resnext_hub.data.batches import defer_stop_signals, read_items
from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, opened, read_bytes, upright
from resnext_hub.data.images import IndexedImages
from resnext_hub.machine import cores

THUMBNAIL = 16
"""Width and height of thumbnails in pixels."""

HASHED = 32
"""Width and height that images are reduced to before hashing, as imagehash.phash does."""

SERIAL = 200
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
    labels: tuple[int, ...]
    """Its class, or which of several labels it has."""
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
class Examined:
    """Images of one or more splits, in the order of `images`."""

    images: tuple[Facts, ...]
    hashes: np.ndarray
    """Perceptual hashes of each image and of its mirror image, `(N, 2)` uint64."""
    thumbnails: np.ndarray
    """Thumbnails, `(N, 16, 16, 3)` uint8."""

    @property
    def comparable(self) -> np.ndarray:
        """Indices of the images that a hash describes: readable, and not of a single color."""
        found = [i for i, facts in enumerate(self.images) if facts.size and not facts.blank]
        return np.array(found, dtype=np.int64)

    @property
    def detailed(self) -> np.ndarray:
        """Whether each image has enough detail to be told apart from others by its hash, `(N,)` bool.

        All have if at least half of them have as many pixels as a hash looks at: among few small images, it is unlikely
        that two look alike by chance.
        """
        sizes = (facts.size or (0, 0) for facts in self.images)
        found = np.array([width * height >= HASHED * HASHED for width, height in sizes], dtype=bool)
        return np.ones_like(found) if 2 * found.sum() >= len(found) else found


def examine_images(splits: Mapping[str, IndexedImages], workers: int | None = None) -> Examined:
    """Decode the images of some splits.

    Args:
        splits: The splits by name.
        workers: Number of processes; one per core if not given, and none for few images.

    Raises:
        RunError: If reading fails.
    """
    if workers is None:
        workers = cores() if sum(map(len, splits.values())) > SERIAL else 0
    read = list(_read(splits, workers))
    return Examined(
        images=tuple(facts for facts, _, _ in read),
        hashes=np.array([hashes for _, hashes, _ in read], dtype=np.uint64).reshape(len(read), 2),
        thumbnails=np.stack([thumbnail for _, _, thumbnail in read]),
    )


class _Examination(Dataset[Any]):
    """Facts, hashes and thumbnail of each image, by its place in all splits."""

    def __init__(self, splits: Mapping[str, IndexedImages]) -> None:
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
            labels=images.label_set(index),
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
    small = decoded.resize((HASHED, HASHED), Image.Resampling.LANCZOS, reducing_gap=3.0)
    gray = small.convert("L")
    hashes = [int(str(imagehash.phash(view)), 16) for view in (gray, ImageOps.mirror(gray))]
    blank = decoded.getcolors(maxcolors=1) is not None
    thumbnail = np.asarray(small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return replace(facts, size=decoded.size, mode=mode, blank=blank), (hashes[0], hashes[1]), thumbnail


def _read(splits: Mapping[str, IndexedImages], workers: int) -> Iterator[tuple[Facts, tuple[int, int], np.ndarray]]:
    loader: DataLoader[Any] = DataLoader(
        _Examination(splits),
        batch_size=_BATCH,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=defer_stop_signals if workers else None,
    )
    with tqdm(total=sum(map(len, splits.values())), unit="image", disable=None) as bar:  # shown on a terminal
        for batch in read_items(loader):
            yield from batch
            bar.update(len(batch))


def _unchanged(items: Sequence[Any]) -> Sequence[Any]:
    return items
