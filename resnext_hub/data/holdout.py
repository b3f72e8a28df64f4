"""Hold out parts of a training split, and check pairs of splits for likely mistakes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from resnext_hub.data.config import DataConfig
from resnext_hub.data.folds import assign_folds
from resnext_hub.data.images import count_labels
from resnext_hub.errors import RequestError, setting
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


def strata_of(labels: np.ndarray) -> np.ndarray:
    """Return what to stratify by, `(N,)`: the labels, or of several labels of an image the rarest one.

    So a rare label is divided as evenly as a class. Images without labels form a stratum of their own.
    """
    if labels.ndim == 1:
        return labels
    order = np.argsort(labels.sum(axis=0), kind="stable")
    rarest: np.ndarray = order[labels[:, order].argmax(axis=1)]
    return np.where(labels.any(axis=1), rarest, labels.shape[1])


def hold_out(config: DataConfig, labels: np.ndarray, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the rows of each part of a run, holding out the parts that have no split of their own.

    The evaluation images are the same with and without a test.

    Args:
        config: How much to hold out.
        labels: Labels of the training split, `(N,)`, or what else to stratify by.
        rows: Rows of the stored splits by part: `training`, and `evaluation` and `test` if they are stored.

    Raises:
        RequestError: If too much is to be held out, or no class has two images.
    """
    parts, remaining = dict(rows), 1.0
    if "evaluation" not in rows:
        parts["training"], parts["evaluation"] = stratified_split(labels, config.eval_fraction, config.split_seed)
        remaining -= config.eval_fraction
    if not config.test_fraction:
        return parts
    if config.test_fraction > remaining - 0.1 + 1e-9:
        raise RequestError(
            f"{setting('test_fraction', config.test_fraction)} and {setting('eval_fraction', config.eval_fraction)} "
            "leave too few images to train on: expected at most 0.9 in total"
        )
    kept = parts["training"]
    try:
        train, test = stratified_split(labels[kept], config.test_fraction / remaining, config.split_seed)
    except RequestError as error:
        if "evaluation" in rows:
            raise
        raise RequestError(
            f"{setting('test_fraction', config.test_fraction)}: no images are left for a test, because each class has "
            "only one image after the evaluation images are held out; add images, or omit this setting"
        ) from error
    return parts | {"training": kept[train], "test": kept[test]}


def divide(
    config: DataConfig, labels: np.ndarray, rows: Mapping[str, np.ndarray], groups: Callable[[], Sequence[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the rows of each part of a run: those of its fold, or as `hold_out` does, without separating duplicates.

    Args:
        config: How to divide the training split.
        labels: What to stratify it by, `(N,)`.
        rows: Rows of the stored splits by part: `training`, and `evaluation` and `test` if they are stored.
        groups: Finds rows of the training split with the same content; called if `group_duplicates` is set.

    Raises:
        RequestError: If a part would be empty.
    """
    if config.folds is not None:
        together = groups() if config.group_duplicates else []
        evaluated = assign_folds(labels, together, config.folds, config.split_seed) == (config.fold or 1) - 1
        return {**rows, "training": np.flatnonzero(~evaluated), "evaluation": np.flatnonzero(evaluated)}
    parts = hold_out(config, labels, rows)
    if config.group_duplicates:
        of_training = {part: chosen for part, chosen in parts.items() if part == "training" or part not in rows}
        parts |= keep_together(of_training, groups(), labels, config.split_seed)
    return parts


def keep_together(
    parts: Mapping[str, np.ndarray], groups: Sequence[np.ndarray], labels: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Return parts of one split without a group of duplicates that is spread over several parts.

    Such a group moves as a whole to the training part, or to a part that has lost as many images of its class to
    others; what parts still lack then is replaced by training images of the same class that are in no group. Without
    groups, nothing moves.

    Args:
        parts: Rows of each part: `training`, and those that were held out.
        groups: Rows with the same content.
        labels: Labels of the split, `(N,)`.
        seed: Seed of the choice of replacements.

    Raises:
        RequestError: If nothing would be left in a part.
    """
    names = list(parts)
    owner, training = np.full(len(labels), -1), names.index("training")
    for number, rows in enumerate(parts.values()):
        owner[rows] = number
    lacking: Counter[tuple[int, int]] = Counter()  # images of a class that a held-out part has lost
    for group in groups:
        owners = list(dict.fromkeys(owner[group].tolist()))
        if len(owners) == 1:
            continue
        target = training
        for number in owners:
            gained = Counter(labels[group[owner[group] != number]].tolist())
            if number != training and all(lacking[number, label] >= count for label, count in gained.items()):
                target = number
        for row in group[owner[group] != target].tolist():
            lacking[int(owner[row]), int(labels[row])] += 1
            lacking[target, int(labels[row])] -= 1
            owner[row] = target
    single = np.ones(len(labels), dtype=bool)
    single[np.concatenate([*groups, np.empty(0, dtype=np.int64)])] = False
    spare = np.random.RandomState(seed).permutation(np.flatnonzero(single & (owner == training)))
    spare = spare[np.argsort(labels[spare], kind="stable")]
    for (number, label), count in lacking.items():
        if number != training and count > 0:
            first, last = np.searchsorted(labels[spare], [label, label + 1])
            unused = spare[first:last][owner[spare[first:last]] == training]
            owner[unused[:count]] = number
    kept = {name: np.flatnonzero(owner == number) for number, name in enumerate(names)}
    if not all(map(len, kept.values())):
        raise RequestError(
            "no images can be held out, because each has a copy that is needed for training; remove the copies "
            f"(resnext-hub check lists them), or use {setting('group_duplicates', False)}"
        )
    return kept


def likely_mistakes(names: Sequence[str], train: np.ndarray, other: np.ndarray, part: str) -> list[str]:
    """Return warnings about classes of another split that have no training images.

    Args:
        names: Names of the classes.
        train: Labels of the training split, `(N,)` or `(N, classes)`.
        other: Labels of the other split.
        part: Name of the other split.
    """
    in_train, in_other = (count_labels(labels, len(names)) for labels in (train, other))
    untrained = [names[int(i)] for i in np.flatnonzero((in_train == 0) & (in_other > 0))]
    return [f"no training images for {listing(untrained)}, but the {part} split has some"] if untrained else []


def similar_names(names: Sequence[str]) -> list[list[str]]:
    """Return groups of class names that differ only in case or spaces, and so may be one class."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    return [group for group in alike.values() if len(group) > 1]
