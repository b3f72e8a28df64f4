"""What a table holds: which column is the images, which the classes, and what the classes are called.

Columns are found by their type, since their names differ from dataset to dataset.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.sources import Part
from resnext_hub.data.sources.names import class_names_of
from resnext_hub.data.sources.parquet import is_encoded_image
from resnext_hub.errors import RequestError, one_line
from resnext_hub.text import listing as listing
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets


def find_image_column(
    dataset: str, asked: str | None, train: "datasets.Dataset", evaluation: "datasets.Dataset | None"
) -> tuple[str, "datasets.Dataset", "datasets.Dataset | None"]:
    """Return the column of images, and both tables with it undecoded."""
    import datasets

    features = train.features
    column = asked
    if column is not None and column not in features:
        raise RequestError(
            f"--image-column {printable(column)}: there is no such column, but {describe_columns(features)}"
        )
    if column is None:
        candidates = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        candidates = candidates or [name for name, kind in features.items() if is_encoded_image(kind)]
        if not candidates:
            raise RequestError(f"{dataset} has no image column: it has {describe_columns(features)}")
        if len(candidates) > 1:
            raise RequestError(
                f"{dataset} has several image columns; name one with --image-column: {listing(candidates)}"
            )
        column = candidates[0]
    elif not isinstance(features[column], datasets.Image) and not is_encoded_image(features[column]):
        raise RequestError(
            f"--image-column {printable(column)} holds no images: the columns are {describe_columns(features)}"
        )
    if evaluation is not None and column not in evaluation.features:
        raise RequestError(
            f"the evaluation split has no image column {printable(column)}: it has "
            f"{describe_columns(evaluation.features)}"
        )
    undecoded = datasets.Image(decode=False)
    return (
        column,
        train.cast_column(column, undecoded),
        None if evaluation is None else evaluation.cast_column(column, undecoded),
    )


def find_label_column(dataset: str, asked: str | None, table: "datasets.Dataset", image_column: str) -> str:
    """Find the column of classes: class labels if there are any, else the only column of integers or strings."""
    import datasets

    features = table.features
    if asked is not None:
        if asked not in features:
            raise RequestError(
                f"--label-column {printable(asked)}: there is no such column, but {describe_columns(features)}"
            )
        return asked
    candidates = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    candidates = candidates or [name for name, kind in features.items() if name != image_column and _kind_of(kind)]
    if not candidates:
        raise RequestError(
            f"{dataset} has no column of classes (whole numbers, strings or class labels): it has "
            f"{describe_columns(features)}"
        )
    if len(candidates) > 1:
        raise RequestError(
            f"{dataset} has several columns that could be the classes; name one with --label-column: "
            f"{listing(candidates)}"
        )
    return str(candidates[0])


@dataclass(frozen=True)
class LabelledTable:
    """A split with its labels: its name for messages, its table, and the files that it comes from."""

    name: str
    table: "datasets.Dataset | datasets.IterableDataset"
    parts: tuple[Part, ...]

    def described(self) -> tuple[Part, ...]:
        """Return the parts, or the whole table as the only one."""
        return self.parts or (Part(f"the {self.name} split", -1, self.table.features or {}),)


def read_labels(
    dataset: str, column: str, train: LabelledTable, evaluation: LabelledTable | None
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Return class names and the labels of both splits, `(N,)` int64 in the range of the names.

    Labels are matched by name: what a number stands for is said by the file that holds it.

    Raises:
        RequestError: If the labels are no classes, differ in kind, are out of range, or cannot train a classifier.
    """
    splits = [train] if evaluation is None else [train, evaluation]
    kind = _shared_kind(dataset, column, [part for split in splits for part in split.described()])
    read = _read_class_labels if kind == "class label" else _read_values
    raw = {split.name: read(column, split) for split in splits}
    # of the classes that only the evaluation split states, those that occur
    order: list[Any] = [*raw[train.name][0], *(own[i] for own, codes in raw.values() for i in np.unique(codes))]
    order = list(dict.fromkeys(order if kind == "class label" else sorted(order)))
    if kind == "number":
        _check_numbers(dataset, column, order)
    if kind == "class label":
        _check_named(dataset, column, order)
    names = class_names_of(map(str, order), f"column {printable(column)} of {dataset}")
    label_names = tuple(dict.fromkeys(names.values()))
    number = {name: i for i, name in enumerate(label_names)}
    labels = {
        split: np.asarray([number.get(names.get(str(label), ""), -1) for label in own], dtype=np.int64)[codes]
        for split, (own, codes) in raw.items()
    }
    present = np.unique(labels[train.name])
    if len(present) < 2:
        only = label_names[present[0]] if len(present) else "none"
        raise RequestError(f"{dataset} has a single class to train on ({only}): a classifier needs at least two")
    if evaluation is None:
        return label_names, labels[train.name], None
    if not np.isin(labels[evaluation.name], present).any():
        known, other = ([label_names[i] for i in np.unique(labels[s.name])] for s in splits)
        raise RequestError(
            f"no class of the evaluation split ({listing(other, 4)}) is in the training split ({listing(known, 4)}); "
            "name another split with --eval-split, or another column with --label-column"
        )
    return label_names, labels[train.name], labels[evaluation.name]


_KINDS = (
    (r"u?int\d+", "number"),
    (r"(large_)?string(_view)?", "text"),
    (r"bool", "truth value"),
)
"""Types of columns that can hold classes, by their names."""


def _kind_of(feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "class label"
    kind = str(getattr(feature, "dtype", "")) if isinstance(feature, datasets.Value) else ""
    return next((name for pattern, name in _KINDS if re.fullmatch(pattern, kind)), None)


def _shared_kind(dataset: str, column: str, parts: Sequence[Part]) -> str:
    """Return what kind of labels all files have.

    Raises:
        RequestError: If a file has no such column, its values are no classes, or the kinds differ.
    """
    import datasets

    kinds: dict[str, Part] = {}
    for part in parts:
        if column not in part.features:
            raise RequestError(
                f"{printable(part.name)} has no column {printable(column)}: it has {describe_columns(part.features)}"
            )
        kind = _kind_of(part.features[column])
        if kind is None:
            raise RequestError(
                f"--label-column {printable(column)} holds no classes in {printable(part.name)} "
                f"({describe_columns({column: part.features[column]})}): expected whole numbers, strings or class "
                "labels"
            )
        kinds.setdefault(kind, part)
    named = [part.features[column] for part in parts if isinstance(part.features[column], datasets.ClassLabel)]
    if set(kinds) == {"class label", "number"} and all(
        feature.names == [str(i) for i in range(feature.num_classes)] for feature in named
    ):
        return "number"  # the names of the numbers are the numbers themselves
    if len(kinds) > 1:
        found = " and ".join(f"a {kind} in {printable(part.name)}" for kind, part in kinds.items())
        raise RequestError(f"column {printable(column)} of {dataset} is {found}; store the labels alike in all files")
    return next(iter(kinds))


def _column_of(column: str, split: LabelledTable) -> Any:
    """Return the labels of a split as one Arrow array."""
    import pyarrow

    labels = split.table.data.column(column)
    try:
        labels.validate(full=True)
    except ValueError as error:
        raise RequestError(
            f"column {printable(column)} of the {split.name} split is damaged ({one_line(error)}); write it again, "
            "text as UTF-8"
        ) from error
    missing = labels.null_count
    if pyarrow.types.is_string_view(labels.type):
        labels = labels.cast(pyarrow.large_string())
    if pyarrow.types.is_string(labels.type) or pyarrow.types.is_large_string(labels.type):
        missing += (
            pyarrow.compute.sum(pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(labels), "")).as_py() or 0
        )
    if missing:
        raise RequestError(
            f"column {printable(column)} of the {split.name} split has {missing} empty labels out of {len(labels)}; "
            "remove those rows or name them"
        )
    return labels


def _read_class_labels(column: str, split: LabelledTable) -> tuple[list[str], np.ndarray]:
    """Return the names of a split's files, and the index among them of every row's label."""
    values = _column_of(column, split).to_numpy().astype(np.int64)
    names: list[str] = []
    first = 0
    for part in split.described():
        last = len(values) if part.rows < 0 else first + part.rows
        own = part.features[column].names
        codes = values[first:last]
        wrong = np.flatnonzero((codes < 0) | (codes >= len(own)))
        if len(wrong):
            raise RequestError(
                f"label {codes[wrong[0]]} at index {first + wrong[0]} of the {split.name} split is out of range: "
                f"column {printable(column)} has the classes 0 to {len(own) - 1} ({len(wrong)} such labels); "
                "name another split or column"
            )
        if not names:
            names = list(own)
        if own != names[: len(own)]:
            used = {own[i] for i in np.unique(codes)}
            names += [name for name in own if name in used and name not in names]
            place = {name: i for i, name in enumerate(names)}
            values[first:last] = np.asarray([place.get(name, -1) for name in own])[codes]
        first = last
    if first != len(values):
        raise RequestError(
            f"the files of the {split.name} split state {first} rows, but {len(values)} were read; remove the cache of "
            "this dataset and try again"
        )
    return names, values


def _read_values(column: str, split: LabelledTable) -> tuple[list[Any], np.ndarray]:
    """Return the different labels of a split, and the index among them of every row's label."""
    encoded = _column_of(column, split).combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _check_numbers(dataset: str, column: str, labels: Sequence[int]) -> None:
    """Refuse numbers that are no class."""
    odd = [label for label in labels if not -(1 << 31) <= label < 1 << 31]
    rest = [label for label in labels if label >= 0]
    if not odd and len(rest) >= 2 and rest == list(range(len(rest))):
        odd = [label for label in labels if label < 0]  # how images without a label are marked
    if odd:
        others = listing((label for label in labels if label not in odd), 4)
        raise RequestError(
            f"column {printable(column)} of {dataset} has the label {odd[0]}, which is no class"
            f"{f' beside {others}' if others else ': expected -2147483648 to 2147483647'}; remove those rows, or store "
            "the classes as strings"
        )


def _check_named(dataset: str, column: str, names: Sequence[Any]) -> None:
    """Refuse class labels that state a class without a name."""
    blank = [i for i, name in enumerate(names) if name is None or not str(name).strip()]
    if blank:
        raise RequestError(
            f"column {printable(column)} of {dataset} states a class without a name (number {blank[0]} of "
            f"{listing(names, 4)}); name it in the ClassLabel"
        )


def class_names(dataset: str, column: str, train: LabelledTable, evaluation: LabelledTable) -> tuple[str, ...]:
    """Return the class names of two streams, whose files have to state the same ones, as nothing is read.

    Raises:
        RequestError: If they do not.
    """
    parts = [*train.described(), *evaluation.described()]
    if _shared_kind(dataset, column, parts) != "class label":
        raise RequestError(
            f"column {printable(column)} of {dataset} does not say what its classes are, and a stream cannot be "
            "searched for them: leave out --streaming, or store the column as ClassLabel"
        )
    first = list(parts[0].features[column].names)
    for part in parts:
        if part.features[column].names != first:
            raise RequestError(
                f"{printable(part.name)} has other classes in column {printable(column)}, or in another order, "
                f"({listing(part.features[column].names, 4)}) than {printable(parts[0].name)} ({listing(first, 4)}); "
                "leave out --streaming, and they are matched by name"
            )
    _check_named(dataset, column, first)
    names = class_names_of(first, f"column {printable(column)} of {dataset}")
    if len(set(names.values())) < len(first):
        raise RequestError(
            f"column {printable(column)} of {dataset} has one class in two spellings of Unicode; leave out --streaming"
        )
    if len(first) < 2:
        raise RequestError(f"{dataset} has a single class ({listing(first)}): a classifier needs at least two")
    return tuple(names.values())


def describe_columns(features: dict[str, Any]) -> str:
    """List columns with their types, for a message."""
    return listing(f"{name} ({getattr(kind, 'dtype', None) or type(kind).__name__})" for name, kind in features.items())
