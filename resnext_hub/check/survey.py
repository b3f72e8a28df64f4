"""Examine the images of all splits of a dataset."""

import logging
from collections.abc import Container
from dataclasses import dataclass, replace

import numpy as np

from resnext_hub.data.config import NO_TEST, DataConfig
from resnext_hub.data.examine import Examined, examine_images
from resnext_hub.data.exclude import Entry, read_exclusions
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.sources import public_name
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey(Examined):
    """The images of all splits of a dataset."""

    label_names: tuple[str, ...]
    splits: dict[str, IndexedImages]
    """The images of each split; one that was held out is called `held out`."""
    stored: dict[str, str]
    """The split that the images of each of `splits` are stored in."""
    source_digest: str
    """Identifies the rows of the dataset as it is stored."""
    kept_together: bool
    """Whether training keeps duplicates in one part when it holds images out."""
    excluded: tuple[Entry, ...]
    """Images that were left out."""


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
    _logger.info("%s: reading %d images", printable(public_name(config.dataset)), total)
    examined = examine_images(splits, workers)
    return Survey(
        label_names=label_names,
        splits=splits,
        stored={name: name if name in loaded.stored else str(loaded.found.train_split) for name in splits},
        kept_together=config.group_duplicates is not False,
        source_digest=str(loaded.source_digest),
        excluded=read_exclusions(config.exclude).entries,
        images=examined.images,
        hashes=examined.hashes,
        thumbnails=examined.thumbnails,
    )


def _all_splits(config: DataConfig) -> tuple[Splits, dict[str, IndexedImages], tuple[str, ...]]:
    """Return the splits that training would use, the images of these and of all others, and all class names."""
    # finding duplicates is what the survey is for
    loaded = load_splits(replace(config, group_duplicates=False))
    found = loaded.found
    splits = used_images(loaded)
    names = list(loaded.label_names)
    for split in loaded.stored:
        if split in splits:
            continue
        try:
            other = load_splits(replace(found, eval_split=split, test_split=NO_TEST, test_fraction=0.0))
        except RequestError as error:
            _logger.warning("the %s split is not checked: %s", printable(split), error)
            continue
        names += [name for name in other.label_names if name not in names]
        number = np.array([names.index(name) for name in other.label_names])
        assert isinstance(other.eval, IndexedImages)
        splits[split] = replace(other.eval, labels=_renumbered(other.eval, number))
    if loaded.is_multi_label:  # other splits can have more labels
        splits = {
            split: replace(images, labels=np.pad(images.labels, ((0, 0), (0, len(names) - images.labels.shape[1]))))
            for split, images in splits.items()
        }
    return loaded, splits, tuple(names)


def _renumbered(images: IndexedImages, number: np.ndarray) -> np.ndarray:
    """Return the labels of images with other numbers."""
    if not images.is_multi_label:
        return np.asarray(number[images.labels])
    labels = np.zeros((len(images), number.max() + 1), dtype=bool)
    labels[:, number] = images.labels
    return labels


def used_images(loaded: Splits) -> dict[str, IndexedImages]:
    """Return the images that training uses by the name of their split, the training split first."""
    splits = {str(loaded.found.train_split): loaded.train}
    for part, images in loaded.evaluated.items():
        splits[loaded.stored_in(part) or _unused(HELD_OUT[part], loaded.stored)] = images
    assert all(isinstance(images, IndexedImages) for images in splits.values())
    return splits  # type: ignore[return-value] # as asserted


def _unused(name: str, others: Container[str]) -> str:
    return name if name not in others else f"{name} by training"
