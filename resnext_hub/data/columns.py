"""Find the image and label columns of a table, and the names of its classes.

Columns are found by type, since their names differ from dataset to dataset.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.sources import Part
from resnext_hub.data.sources.names import class_names_of
from resnext_hub.data.sources.parquet import is_encoded_image
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.text import listing as listing
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets


def find_image_column(
    dataset: str, requested: str | None, tables: "Mapping[str, datasets.Dataset]"
) -> tuple[str, "dict[str, datasets.Dataset]"]:
    """Return the image column of the first table, and all tables with that column undecoded."""
    import datasets

    first, *others = tables
    features = tables[first].features
    column = requested
    if column is not None and column not in features:
        raise RequestError(
            f"{setting('image_column', column)}: {dataset} has no such column; its columns: "
            f"{describe_columns(features)}"
        )
    if column is None:
        candidates = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        candidates = candidates or [name for name, kind in features.items() if is_encoded_image(kind)]
        if not candidates:
            raise RequestError(
                f"{dataset} has no image column (of type Image or binary); its columns: {describe_columns(features)}"
            )
        if len(candidates) > 1:
            raise RequestError(
                f"{dataset} has several image columns ({listing(candidates)}); choose one with "
                f"{setting('image_column', candidates[0])}"
            )
        column = candidates[0]
    elif not isinstance(features[column], datasets.Image) and not is_encoded_image(features[column]):
        raise RequestError(
            f"{setting('image_column', column)} is not a column of images; the columns of {dataset}: "
            f"{describe_columns(features)}"
        )
    for name in others:
        if column not in tables[name].features:
            raise RequestError(
                f"the {name} split has no image column {printable(column)}; its columns: "
                f"{describe_columns(tables[name].features)}"
            )
    undecoded = datasets.Image(decode=False)
    return column, {name: table.cast_column(column, undecoded) for name, table in tables.items()}


def find_label_column(dataset: str, requested: str | None, table: "datasets.Dataset", image_column: str) -> str:
    """Return the label column: the ClassLabel column if there is one, else the only column of integers or strings."""
    import datasets

    features = table.features
    if requested is not None:
        if requested not in features:
            raise RequestError(
                f"{setting('label_column', requested)}: {dataset} has no such column; its columns: "
                f"{describe_columns(features)}"
            )
        return requested
    candidates = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    candidates = candidates or [name for name, kind in features.items() if name != image_column and _kind_of(kind)]
    if not candidates:
        raise RequestError(
            f"{dataset} has no label column (integers, strings or ClassLabel); its columns: "
            f"{describe_columns(features)}"
        )
    if len(candidates) > 1:
        raise RequestError(
            f"{dataset} has several columns that could be labels ({listing(candidates)}); choose one with "
            f"{setting('label_column', candidates[0])}"
        )
    return str(candidates[0])


@dataclass(frozen=True)
class LabelledTable:
    """A split with labels: its part in a run, its table, and the files that its rows come from."""

    name: str
    """`training`, `evaluation` or `test`."""
    table: "datasets.Dataset | datasets.IterableDataset"
    parts: tuple[Part, ...]

    def described(self) -> tuple[Part, ...]:
        """Return the parts, or the whole table as a single part."""
        return self.parts or (Part(f"the {self.name} split", -1, self.table.features or {}),)


def read_labels(
    dataset: str, column: str, splits: Sequence[LabelledTable]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the class names, and the labels of each split as indices of them, `(N,)` int64; training comes first.

    Labels are matched by name, because each file defines what its own numbers stand for.

    Raises:
        RequestError: If the labels are not classes, differ in kind, are out of range, or cannot train a classifier.
    """
    train, *others = splits
    kind = _shared_kind(dataset, column, [part for split in splits for part in split.described()])
    read = _read_class_labels if kind == "class label" else _read_values
    raw = {split.name: read(column, split) for split in splits}
    # classes that only another split defines count if they occur
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
        raise RequestError(f"{dataset} has a single class to train on ({only}); a classifier needs at least two")
    for split in others:
        if not np.isin(labels[split.name], present).any():
            known, other = ([label_names[i] for i in np.unique(labels[s.name])] for s in (train, split))
            flag = setting("eval_split" if split.name == "evaluation" else "test_split")
            raise RequestError(
                f"no class of the {split.name} split ({listing(other, 4)}) is in the training split "
                f"({listing(known, 4)}); choose another {flag} or {setting('label_column')}"
            )
    return label_names, labels


_KINDS = (
    (r"u?int\d+", "number"),
    (r"(large_)?string(_view)?", "text"),
    (r"bool", "truth value"),
)
"""Types of columns that can hold labels, with their names in messages."""


def _kind_of(feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "class label"
    kind = str(getattr(feature, "dtype", "")) if isinstance(feature, datasets.Value) else ""
    return next((name for pattern, name in _KINDS if re.fullmatch(pattern, kind)), None)


def _shared_kind(dataset: str, column: str, parts: Sequence[Part]) -> str:
    """Return the kind of labels that all files have.

    Raises:
        RequestError: If a file has no such column, its values are not classes, or the kinds differ.
    """
    import datasets

    kinds: dict[str, Part] = {}
    for part in parts:
        if column not in part.features:
            raise RequestError(
                f"{printable(part.name)} has no column {printable(column)}; its columns: "
                f"{describe_columns(part.features)}"
            )
        kind = _kind_of(part.features[column])
        if kind is None:
            raise RequestError(
                f"{setting('label_column', column)} does not hold classes in {printable(part.name)}: it has type "
                f"{_type_name(part.features[column])}; expected integers, strings or ClassLabel"
            )
        kinds.setdefault(kind, part)
    named = [part.features[column] for part in parts if isinstance(part.features[column], datasets.ClassLabel)]
    if set(kinds) == {"class label", "number"} and all(
        feature.names == [str(i) for i in range(feature.num_classes)] for feature in named
    ):
        return "number"  # each class is named after its number
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {printable(part.name)}" for kind, part in kinds.items())
        raise RequestError(
            f"column {printable(column)} of {dataset} has several types ({found}); store one type in all files"
        )
    return next(iter(kinds))


def _column_of(column: str, split: LabelledTable) -> Any:
    """Return the labels of a split as one Arrow array."""
    import pyarrow

    labels = split.table.data.column(column)
    try:
        labels.validate(full=True)
    except ValueError as error:
        raise RequestError(
            f"column {printable(column)} of the {split.name} split is damaged ({one_line(error)}); rewrite it with "
            "valid UTF-8 text"
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
            "remove those rows or label them"
        )
    return labels


def _read_class_labels(column: str, split: LabelledTable) -> tuple[list[str], np.ndarray]:
    """Return the class names in a split's files, and each row's label as an index of them."""
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
                f"column {printable(column)} has classes 0 to {len(own) - 1} ({len(wrong)} such labels); "
                "choose another split or column"
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
            f"the files of the {split.name} split have {first} rows, but {len(values)} were read; delete the cached "
            "copy of this dataset and retry"
        )
    return names, values


def _read_values(column: str, split: LabelledTable) -> tuple[list[Any], np.ndarray]:
    """Return the distinct labels of a split, and each row's label as an index of them."""
    encoded = _column_of(column, split).combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _check_numbers(dataset: str, column: str, labels: Sequence[int]) -> None:
    """Raise RequestError for numbers that cannot be classes."""
    odd = [label for label in labels if not -(1 << 31) <= label < 1 << 31]
    rest = [label for label in labels if label >= 0]
    if not odd and len(rest) >= 2 and rest == list(range(len(rest))):
        odd = [label for label in labels if label < 0]  # these mark images without a label
    if odd:
        others = listing((label for label in labels if label not in odd), 4)
        raise RequestError(
            f"column {printable(column)} of {dataset} has the label {odd[0]}, which does not look like a class"
            f"{f' (the others: {others})' if others else ': expected -2147483648 to 2147483647'}; remove those rows, "
            "or store the classes as strings"
        )


def _check_named(dataset: str, column: str, names: Sequence[Any]) -> None:
    """Raise RequestError for a ClassLabel that has a class without a name."""
    blank = [i for i, name in enumerate(names) if name is None or not str(name).strip()]
    if blank:
        raise RequestError(
            f"column {printable(column)} of {dataset} has a class without a name (index {blank[0]} in "
            f"{listing(names, 4)}); give it a name in the ClassLabel"
        )


def class_names(dataset: str, column: str, splits: Sequence[LabelledTable]) -> tuple[str, ...]:
    """Return the class names of streams; all files have to define the same ones, because no rows are read.

    Raises:
        RequestError: If they do not.
    """
    parts = [part for split in splits for part in split.described()]
    if _shared_kind(dataset, column, parts) != "class label":
        raise RequestError(
            f"column {printable(column)} of {dataset} does not define its classes, and they cannot be collected from a "
            f"stream; store it as ClassLabel, or use {setting('streaming', False)}"
        )
    first = list(parts[0].features[column].names)
    for part in parts:
        if part.features[column].names != first:
            raise RequestError(
                f"column {printable(column)} has different classes, or the same classes in a different order, in "
                f"{printable(part.name)} "
                f"({listing(part.features[column].names, 4)}) than in {printable(parts[0].name)} "
                f"({listing(first, 4)}); use {setting('streaming', False)} to match them by name"
            )
    _check_named(dataset, column, first)
    names = class_names_of(first, f"column {printable(column)} of {dataset}")
    if len(set(names.values())) < len(first):
        raise RequestError(
            f"column {printable(column)} of {dataset} has one class in two Unicode spellings; use "
            f"{setting('streaming', False)} to merge them"
        )
    if len(first) < 2:
        raise RequestError(f"{dataset} has a single class ({listing(first)}); a classifier needs at least two")
    return tuple(names.values())


def describe_columns(features: dict[str, Any]) -> str:
    """Return the columns with their types, for a message."""
    return listing(f"{name} ({_type_name(kind)})" for name, kind in features.items())


def _type_name(kind: Any) -> str:
    return printable(getattr(kind, "dtype", None) or type(kind).__name__)
