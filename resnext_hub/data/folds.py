"""Divide a training split into folds for cross-validation: stratified, without separating duplicates."""

import heapq
from collections.abc import Sequence

import numpy as np

from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing


def assign_folds(labels: np.ndarray, groups: Sequence[np.ndarray], folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, `(N,)` from 0: every image is in exactly one, and a group of duplicates in one.

    Images of a class differ by at most one in number between folds, and so do all images, as far as groups allow it:
    groups are assigned first, the largest ones first, and the other images fill up the folds that have the fewest.

    Args:
        labels: What to stratify by, `(N,)`.
        groups: Images with the same content, as indices.
        folds: Number of folds.
        seed: Seed of the choice of images.

    Raises:
        RequestError: If a fold would be empty.
    """
    owner = np.full(len(labels), -1)
    classes = int(labels.max()) + 1 if len(labels) else 0
    counts, totals = np.zeros((classes, folds), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for group in sorted(groups, key=lambda group: (-len(group), int(group.min()))):
        own = np.bincount(labels[group], minlength=classes)
        fold = int(np.lexsort((totals, own @ counts))[0])  # the fewest of its classes, then the fewest images
        owner[group] = fold
        counts[:, fold] += own
        totals[fold] += len(group)
    generator = np.random.RandomState(seed)
    free = np.flatnonzero(owner < 0)
    ends = np.bincount(labels[free], minlength=classes).cumsum()
    members = np.split(free[np.argsort(labels[free], kind="stable")], ends[:-1])  # of each class, in ascending order
    for label in range(classes):
        queue = [(int(counts[label, fold]), int(totals[fold]), fold) for fold in range(folds)]
        heapq.heapify(queue)
        for index in generator.permutation(members[label]):
            count, total, fold = queue[0]
            heapq.heapreplace(queue, (count + 1, total + 1, fold))
            owner[index] = fold
        for _, total, fold in queue:
            totals[fold] = total
    if not totals.all():
        raise RequestError(
            f"{setting('folds', folds)} leaves folds without images: the training split has {len(labels)} images"
            f"{f', including {len(groups)} groups of duplicates that stay together' if groups else ''}; use fewer folds"
        )
    return owner


def small_classes(names: Sequence[str], counts: Sequence[int], folds: int) -> str | None:
    """Return a warning about classes with fewer images than folds, or None if there are none."""
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if 0 < count < folds]
    if not small:
        return None
    return (
        f"classes with fewer than {folds} images, the number of folds: {listing(small)}; some folds have no evaluation "
        "images of such a class, and if a class has only one image, that image is evaluated with a model that was not "
        "trained on the class"
    )
