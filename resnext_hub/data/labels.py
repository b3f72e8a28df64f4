"""Read the labels of the splits of a dataset, and the names of the classes that they share."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.columns import LIST, describe_columns, inner_type, kind_of, type_name
from resnext_hub.data.images import count_labels
from resnext_hub.data.sources import Part
from resnext_hub.data.sources.flags import as_flag, join_columns, split_columns
from resnext_hub.data.sources.names import class_names_of
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledTable:
    """A split with labels: its part in a run, its table or stream, and the files that its rows come from."""

    name: str
    """`training`, `evaluation` or `test`."""
    table: "datasets.Dataset"
    parts: tuple[Part, ...]

    def described(self) -> tuple[Part, ...]:
        """Return the parts, or the whole table as a single part."""
        return self.parts or (Part(f"the {self.name} split", -1, self.table.features or {}),)


def read_labels(
    dataset: str, column: str, splits: Sequence[LabelledTable]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the class names, and the labels of each split; training comes first.

    Labels are indices of the names, `(N,)` int64, if each image has exactly one, else `(N, classes)` bool. They are
    matched by name, because each file defines what its own numbers stand for.

    Raises:
        RequestError: If the labels are not classes, differ in kind, are out of range, or cannot train a classifier.
    """
    columns = split_columns(column, splits[0].described()[0].features)
    if len(columns) > 1:
        label_names, labels = tuple(columns), {split.name: _read_flags(columns, split) for split in splits}
    else:
        label_names, labels = _read_column(dataset, columns[0], splits)
    if all(rows.ndim == 2 and (rows.sum(axis=1) == 1).all() for rows in labels.values()):
        labels = {split: rows.argmax(axis=1) for split, rows in labels.items()}
        _logger.info(
            "%s: every image has exactly one label, so labels are treated as mutually exclusive classes", dataset
        )
    _check_trainable(dataset, label_names, labels, splits)
    return label_names, labels


def _check_trainable(
    dataset: str, label_names: Sequence[str], labels: Mapping[str, np.ndarray], splits: Sequence[LabelledTable]
) -> None:
    """Raise RequestError for fewer than two classes in training, or another split without any of them."""
    train, *others = (split.name for split in splits)
    present = np.flatnonzero(count_labels(labels[train], len(label_names)))
    if len(present) < 2:
        what = f"a single class to train on ({label_names[int(present[0])]})" if len(present) else "no training class"
        raise RequestError(f"{dataset} has {what}; a classifier needs at least two")
    for split in others:
        found = np.flatnonzero(count_labels(labels[split], len(label_names)))
        if not np.isin(found, present).any():
            known, other = ([label_names[int(i)] for i in classes] for classes in (present, found))
            flag = setting("eval_split" if split == "evaluation" else "test_split")
            raise RequestError(
                f"no class of the {split} split ({listing(other, 4)}) is in the training split "
                f"({listing(known, 4)}); choose another {flag} or {setting('label_column')}"
            )


def _read_column(
    dataset: str, column: str, splits: Sequence[LabelledTable]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the class names and the labels in a column of labels, or of lists of labels; see `read_labels`."""
    kind = _shared_kind(dataset, column, [part for split in splits for part in split.described()])
    inner = kind.removeprefix(LIST)
    read = _read_class_labels if inner == "class label" else _read_values
    stored = {split.name: _column_of(column, split) for split in splits}
    raw = {split.name: read(column, split, stored[split.name]) for split in splits}
    # classes that only another split defines count if they occur
    order: list[Any] = [
        *raw[splits[0].name][0],
        *(own[i] for own, codes in raw.values() for i in np.unique(codes)),
    ]
    order = list(dict.fromkeys(order if inner == "class label" else sorted(order)))
    if inner == "number":
        _check_numbers(dataset, column, order)
    if inner == "class label":
        _check_named(dataset, column, order)
    names = class_names_of(map(str, order), f"column {printable(column)} of {dataset}")
    label_names = tuple(dict.fromkeys(names.values()))
    number = {name: i for i, name in enumerate(label_names)}
    labels = {}
    for split, (own, codes) in raw.items():
        found = np.asarray([number.get(names.get(str(label), ""), -1) for label in own], dtype=np.int64)[codes]
        labels[split] = found if kind == inner else stored[split].as_sets(found, len(label_names))
    return label_names, labels


def _read_flags(columns: Sequence[str], split: LabelledTable) -> np.ndarray:
    """Return the labels in several columns of 0 and 1, `(N, columns)` bool.

    Raises:
        RequestError: If a column is missing or has other values.
    """
    found = np.zeros((len(split.table), len(columns)), dtype=bool)
    for i, name in enumerate(columns):
        if name not in split.table.features:
            raise RequestError(
                f"the {split.name} split has no column {printable(name)}; its columns: "
                f"{describe_columns(split.table.features)}"
            )
        encoded = split.table.data.column(name).combine_chunks().dictionary_encode(null_encoding="encode")
        values = encoded.dictionary.to_pylist()
        odd = [value for value in values if as_flag(value) is None]
        if odd:
            raise RequestError(
                f"{setting('label_column', join_columns(columns))}: column {printable(name)} of the {split.name} split "
                f"contains {printable(odd[0])}; several label columns must contain only 0 and 1"
            )
        found[:, i] = np.asarray([as_flag(value) for value in values])[encoded.indices.to_numpy()]
    return found


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
        kind = kind_of(part.features[column])
        if kind is None:
            raise RequestError(
                f"{setting('label_column', column)} does not contain classes in {printable(part.name)}: it has type "
                f"{type_name(part.features[column])}; expected integers, strings or ClassLabel, or lists of them"
            )
        kinds.setdefault(kind, part)
    inner = [inner_type(part.features[column]) for part in parts]
    named = [feature for feature in inner if isinstance(feature, datasets.ClassLabel)]
    for prefix in ("", LIST):
        if set(kinds) == {f"{prefix}class label", f"{prefix}number"} and all(
            feature.names == [str(i) for i in range(feature.num_classes)] for feature in named
        ):
            return f"{prefix}number"  # each class is named after its number
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {printable(part.name)}" for kind, part in kinds.items())
        raise RequestError(
            f"column {printable(column)} of {dataset} has several types ({found}); store the same type in all files"
        )
    return next(iter(kinds))


@dataclass(frozen=True, eq=False)
class _Labels:
    """The labels of a split as they are stored, those of all lists in a row."""

    values: Any
    """Arrow array of labels."""
    ends: np.ndarray
    """For each row of the split, how many labels precede the next one, `(N,)` int64."""

    def as_sets(self, codes: np.ndarray, classes: int) -> np.ndarray:
        """Return labels as `(N, classes)` bool; -1 stands for none."""
        found = np.zeros((len(self.ends), classes), dtype=bool)
        rows = np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))
        found[rows[codes >= 0], codes[codes >= 0]] = True
        return found


def _column_of(column: str, split: LabelledTable) -> _Labels:
    """Return the labels of a split."""
    import pyarrow

    labels = split.table.data.column(column)
    try:
        labels.validate(full=True)
    except ValueError as error:
        raise RequestError(
            f"column {printable(column)} of the {split.name} split is damaged ({one_line(error)}); rewrite it with "
            "valid UTF-8 text"
        ) from error
    missing, ends = labels.null_count, np.arange(1, len(labels) + 1)
    feature = split.table.features[column]
    if inner_type(feature) is not feature:
        ends = np.cumsum(pyarrow.compute.list_value_length(labels).fill_null(0).to_numpy())
        labels = pyarrow.compute.list_flatten(labels)
        missing += labels.null_count
    if pyarrow.types.is_string_view(labels.type):
        labels = labels.cast(pyarrow.large_string())
    if pyarrow.types.is_string(labels.type) or pyarrow.types.is_large_string(labels.type):
        missing += (
            pyarrow.compute.sum(pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(labels), "")).as_py() or 0
        )
    if missing:
        raise RequestError(
            f"column {printable(column)} of the {split.name} split has {missing} empty labels out of {len(ends)}; "
            "remove those rows or label them"
        )
    return _Labels(labels, ends)


def _read_class_labels(column: str, split: LabelledTable, labels: _Labels) -> tuple[list[str], np.ndarray]:
    """Return the class names in a split's files, and each label as an index of them."""
    values = labels.values.to_numpy().astype(np.int64)
    names: list[str] = []
    row = first = 0
    for part in split.described():
        row = len(labels.ends) if part.rows < 0 else row + part.rows
        last = int(labels.ends[min(row, len(labels.ends)) - 1]) if row else 0
        own = inner_type(part.features[column]).names
        codes = values[first:last]
        wrong = np.flatnonzero((codes < 0) | (codes >= len(own)))
        if len(wrong):
            index = int(np.searchsorted(labels.ends, first + wrong[0], side="right"))
            raise RequestError(
                f"label {codes[wrong[0]]} at index {index} of the {split.name} split is out of range: "
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
    if row != len(labels.ends):
        raise RequestError(
            f"the files of the {split.name} split have {row} rows, but {len(labels.ends)} were read; delete the cached "
            "copy of this dataset and retry"
        )
    return names, values


def _read_values(column: str, split: LabelledTable, labels: _Labels) -> tuple[list[Any], np.ndarray]:
    """Return the distinct labels of a split, and each label as an index of them."""
    encoded = labels.values.combine_chunks().dictionary_encode()
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
            f"{f' (other labels: {others})' if others else ': expected -2147483648 to 2147483647'}; remove those rows, "
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
    several = split_columns(column, parts[0].features)
    kind = LIST if len(several) > 1 else _shared_kind(dataset, column, parts)
    if kind.startswith(LIST):
        raise RequestError(
            f"{setting('streaming', True)} supports only one label per image, but {dataset} has several, in "
            f"{listing(several)}; use {setting('streaming', False)}"
        )
    if kind != "class label":
        raise RequestError(
            f"column {printable(column)} of {dataset} does not define its classes, and they cannot be collected from a "
            f"stream; store it as ClassLabel, or use {setting('streaming', False)}"
        )
    first = list(parts[0].features[column].names)
    for part in parts:
        if part.features[column].names != first:
            raise RequestError(
                f"the classes of column {printable(column)} in {printable(part.name)} "
                f"({listing(part.features[column].names, 4)}) differ from those in {printable(parts[0].name)} "
                f"({listing(first, 4)}), or are in a different order; use {setting('streaming', False)} to match them "
                "by name"
            )
    _check_named(dataset, column, first)
    names = class_names_of(first, f"column {printable(column)} of {dataset}")
    if len(set(names.values())) < len(first):
        raise RequestError(
            f"column {printable(column)} of {dataset} has the same class name in two Unicode normalization forms; use "
            f"{setting('streaming', False)} to merge them"
        )
    if len(first) < 2:
        raise RequestError(f"{dataset} has a single class ({listing(first)}); a classifier needs at least two")
    return tuple(names.values())
