"""Groups of images with the same content in a split that is divided, so that no held-out image is a copy of another.

Finding them means decoding every image, so the result is kept in the cache, once for each version of a dataset.
"""

import contextlib
import hashlib
import logging
from pathlib import Path

import msgspec
import numpy as np
from filelock import FileLock

from resnext_hub.data.duplicates import duplicate_groups
from resnext_hub.data.examine import examine_images
from resnext_hub.data.images import IndexedImages
from resnext_hub.extras import named_extras
from resnext_hub.files import write_atomic
from resnext_hub.machine import cache_folder

_logger = logging.getLogger(__name__)

_VERSION = 2
"""Changed when the same images would give other groups."""

_MENTIONED = 2000
"""Number of images above which the search takes long enough to mention it."""


def duplicates_in(images: IndexedImages, digest: str, configuration: str | None) -> list[np.ndarray]:
    """Return groups of images with the same content, as indices.

    Of several processes that ask for the same dataset at once, one searches and the others wait.

    Args:
        images: All images of a split.
        digest: Identifies their dataset, for the cache.
        configuration: The configuration of the dataset that they are from, if it has several.

    Raises:
        RunError: If reading fails.
    """
    key = hashlib.sha256(msgspec.json.encode([_VERSION, digest, images.image_column, configuration])).hexdigest()
    kept = cache_folder() / "duplicates" / f"{key[:32]}.json"
    lock = FileLock(f"{kept}.lock")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # without a writable cache, each process searches for itself
        return _search(images)
    try:
        found = _read(kept, len(images))
        if found is None:
            found = _search(images)
            with contextlib.suppress(OSError):
                write_atomic(kept, msgspec.json.encode([group.tolist() for group in found]))
        return found
    finally:
        lock.release()


def _search(images: IndexedImages) -> list[np.ndarray]:
    if len(images) > _MENTIONED:
        _logger.info(
            "looking for duplicates among %d images before holding some out (--no-group-duplicates skips this)",
            len(images),
        )
    with named_extras():
        return [np.array(group) for group in duplicate_groups(examine_images({"": images}))]


def _read(path: Path, count: int) -> list[np.ndarray] | None:
    """Return the groups in a file of the cache; None if there is none, or it is damaged."""
    try:
        groups = [np.array(group) for group in msgspec.json.decode(path.read_bytes(), type=list[list[int]])]
    except (OSError, msgspec.DecodeError):
        return None
    return groups if all(len(group) > 1 and group.min() >= 0 and group.max() < count for group in groups) else None
