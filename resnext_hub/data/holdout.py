"""Hold out an evaluation split from a training split, and check pairs of splits for likely mistakes."""

from collections.abc import Sequence

import numpy as np

from resnext_hub.errors import RequestError
from resnext_hub.text import listing


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices to train on and held-out indices, stratified by class.

    A class with a single image keeps it for training; of any other, at least one image is held out and one kept.

    Raises:
        RequestError: If no class has two images.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    divisible = np.flatnonzero(counts[labels] > 1)
    classes = np.count_nonzero(counts > 1)
    if not classes:
        raise RequestError(
            f"no images can be held out: each of the {np.count_nonzero(counts)} classes has only one image; add images "
            "to at least one class, or an evaluation split to the dataset"
        )
    held_out = np.zeros(len(labels), dtype=bool)
    held = int(np.ceil(fraction * len(divisible)))
    if min(held, len(divisible) - held) >= classes:
        _, chosen = train_test_split(
            divisible, test_size=fraction, stratify=labels[divisible], random_state=np.random.RandomState(seed)
        )
        held_out[chosen] = True
    generator = np.random.RandomState(seed)
    in_order, ends = np.argsort(labels, kind="stable"), np.cumsum(counts)
    taken = np.bincount(labels[held_out], minlength=len(counts))
    for label in np.flatnonzero((counts > 1) & ((taken == 0) | (taken == counts))):
        members = generator.permutation(in_order[ends[label] - counts[label] : ends[label]])
        some = int(np.clip(round(fraction * counts[label]), 1, counts[label] - 1))
        held_out[members] = False
        held_out[members[:some]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def likely_mistakes(names: Sequence[str], train: np.ndarray, evaluation: np.ndarray) -> list[str]:
    """Return warnings about likely mistakes: classes without training images, and nearly equal class names."""
    in_train, in_eval = (np.bincount(labels, minlength=len(names)) for labels in (train, evaluation))
    found = []
    untrained = [names[int(i)] for i in np.flatnonzero((in_train == 0) & (in_eval > 0))]
    if untrained:
        found.append(f"no training images for {listing(untrained)}, but the evaluation split has some")
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            found.append(f"classes {listing(group)} differ only in case or spaces; they are kept separate")
    return found
