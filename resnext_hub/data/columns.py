"""What a table holds: which column is the pictures, which the classes, and what the classes are called.

Columns are found by their type, since their names differ from dataset to dataset.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.errors import RequestError

if TYPE_CHECKING:
    import datasets


def find_image_column(
    dataset: str, asked: str | None, train: "datasets.Dataset", evaluation: "datasets.Dataset | None"
) -> tuple[str, "datasets.Dataset", "datasets.Dataset | None"]:
    """Find the column of pictures, and leave it undecoded in both tables."""
    import datasets

    features = train.features
    column = asked
    if column is not None and column not in features:
        raise RequestError(f"--image-column {column}: there is no such column, but {describe_columns(features)}")
    if column is None:
        candidates = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        candidates = candidates or [name for name, kind in features.items() if _is_encoded_picture(kind)]
        if not candidates:
            raise RequestError(f"{dataset} has no image column: it has {describe_columns(features)}")
        if len(candidates) > 1:
            raise RequestError(
                f"{dataset} has several image columns; name one with --image-column: {listing(candidates)}"
            )
        column = candidates[0]
    elif not isinstance(features[column], datasets.Image) and not _is_encoded_picture(features[column]):
        raise RequestError(f"--image-column {column} holds no pictures: the columns are {describe_columns(features)}")
    undecoded = datasets.Image(decode=False)
    return (
        column,
        train.cast_column(column, undecoded),
        None if evaluation is None else evaluation.cast_column(column, undecoded),
    )


def _is_encoded_picture(feature: Any) -> bool:
    """Say whether a column written without type metadata can hold pictures: bytes, or bytes beside a path."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def find_label_column(dataset: str, asked: str | None, table: "datasets.Dataset", image_column: str) -> str:
    """Find the column of classes: class labels if there are any, else the only column of integers or strings."""
    import datasets

    features = table.features
    if asked is not None:
        if asked not in features:
            raise RequestError(f"--label-column {asked}: there is no such column, but {describe_columns(features)}")
        return asked
    candidates = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    candidates = candidates or [
        name
        for name, kind in features.items()
        if name != image_column and re.match(r"u?int|string|large_string|bool", str(getattr(kind, "dtype", "")))
    ]
    if not candidates:
        raise RequestError(f"{dataset} has no column of classes: it has {describe_columns(features)}")
    if len(candidates) > 1:
        raise RequestError(
            f"{dataset} has several columns that could be the classes; name one with --label-column: "
            f"{listing(candidates)}"
        )
    return str(candidates[0])


def read_labels(
    dataset: str, column: str, train: "datasets.Dataset", evaluation: "datasets.Dataset | None"
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Give class names and the labels of both splits, `(N,)` int64 in the range of the names."""
    import datasets

    tables = {"training": train} | ({} if evaluation is None else {"evaluation": evaluation})
    for name, table in tables.items():
        if column not in table.features:
            raise RequestError(f"the {name} split has no column {column}: it has {describe_columns(table.features)}")
    values = {name: list(table[column][:]) for name, table in tables.items()}
    for name, labels in values.items():
        missing = sum(label is None for label in labels)
        if missing:
            raise RequestError(f"column {column} of the {name} split has {missing} empty labels out of {len(labels)}")
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        numbers = values
    else:
        if isinstance(values["training"][0], (list, dict, float)):
            raise RequestError(f"--label-column {column} holds no classes: expected integers, strings or class labels")
        known = sorted({label for labels in values.values() for label in labels})
        names = tuple(str(label) for label in known)
        number = {label: i for i, label in enumerate(known)}
        numbers = {name: [number[label] for label in labels] for name, labels in values.items()}
    arrays = {name: np.asarray(labels, dtype=np.int64) for name, labels in numbers.items()}
    for name, array in arrays.items():
        wrong = np.flatnonzero((array < 0) | (array >= len(names)))
        if len(wrong):
            raise RequestError(
                f"label {array[wrong[0]]} at index {wrong[0]} of the {name} split is out of range: column {column} has "
                f"the classes 0 to {len(names) - 1} ({len(wrong)} such labels); name another split or column"
            )
    present = np.unique(arrays["training"])
    if len(present) < 2:
        only = names[present[0]] if len(present) else "none"
        raise RequestError(f"{dataset} has a single class to train on ({only}): a classifier needs at least two")
    return names, arrays["training"], arrays.get("evaluation")


def class_names(dataset: str, column: str, train: Any, evaluation: Any) -> tuple[str, ...]:
    """Give the class names of two streams, which have to say them, as nothing is read."""
    import datasets

    kinds = [table.features.get(column) for table in (train, evaluation)]
    if not all(isinstance(kind, datasets.ClassLabel) for kind in kinds):
        raise RequestError(
            f"column {column} of {dataset} does not say what its classes are, and a stream cannot be searched for "
            "them: leave out --streaming, or store the column as ClassLabel"
        )
    if kinds[0].names != kinds[1].names:
        raise RequestError(f"the two splits of {dataset} have other classes in column {column}")
    if len(kinds[0].names) < 2:
        raise RequestError(f"{dataset} has a single class ({kinds[0].names[0]}): a classifier needs at least two")
    return tuple(kinds[0].names)


def describe_columns(features: dict[str, Any]) -> str:
    """List columns with their types, for a message."""
    return listing(f"{name} ({getattr(kind, 'dtype', None) or type(kind).__name__})" for name, kind in features.items())


def listing(names: Iterable[Any], most: int = 12) -> str:
    """List names, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
