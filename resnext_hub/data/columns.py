"""Find the image and label columns of a table.

Columns are found by type, since their names differ from dataset to dataset.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resnext_hub.data.sources.flags import holds_flags, join_columns, parse_columns, split_columns
from resnext_hub.data.sources.names import is_label_name, names_split
from resnext_hub.data.sources.parquet import is_encoded_image
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing as listing
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


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
    """Return the label column: the ClassLabel column if there is one, else the only column that can hold labels.

    Several columns of 0 and 1 are returned as one name, as by `join_columns`.
    """
    import datasets

    features = table.features
    if requested is not None:
        joined = join_columns(parse_columns(requested))  # what several columns of a table of files are called
        for name in (requested, joined):
            if name in features:
                return name
        if all(name in features for name in split_columns(requested, features)):
            return joined
        raise RequestError(
            f"{setting('label_column', requested)}: {dataset} has no such column; its columns: "
            f"{describe_columns(features)}"
        )
    candidates = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    candidates = candidates or _plain_or_lists(table, image_column)
    flags = _flags_of(table, candidates) if isinstance(table, datasets.Dataset) else []
    if flags:
        return join_columns(flags)
    if not candidates:
        raise RequestError(
            f"{dataset} has no label column (integers, strings or ClassLabel, or lists of them); its columns: "
            f"{describe_columns(features)}"
        )
    if len(candidates) > 1:
        raise RequestError(
            f"{dataset} has several columns that could be labels ({listing(candidates)}); choose one with "
            f"{setting('label_column', candidates[0])}"
        )
    return str(candidates[0])


def _plain_or_lists(table: "datasets.Dataset", image_column: str) -> list[str]:
    """Return the columns of labels, or those of lists of labels if the others only number or name the rows."""
    import datasets

    kinds = {name: kind_of(kind) for name, kind in table.features.items() if name != image_column}
    plain = [name for name, kind in kinds.items() if kind and not kind.startswith(LIST)]
    lists = [name for name, kind in kinds.items() if kind and kind.startswith(LIST)]
    if not lists or not isinstance(table, datasets.Dataset):
        return plain or lists
    return [name for name in plain if len(table.data.column(name).unique()) < len(table)] or lists


def _flags_of(table: "datasets.Dataset", candidates: Sequence[str]) -> list[str]:
    """Return the columns of 0 and 1 that are labels; none unless this is unambiguous, as in `flag_columns`."""
    import datasets

    scalars = {name: kind.dtype for name, kind in table.features.items() if isinstance(kind, datasets.Value)}
    distinct = {name: table.data.column(name).unique() for name in scalars}
    flags = [
        name
        for name, values in distinct.items()
        if re.match(r"bool|u?int|float", scalars[name]) and len(values) < 3 and holds_flags(values.to_pylist())
    ]
    others = [name for name in candidates if name not in flags]
    unclear = any(name not in scalars or len(distinct[name]) < len(table) for name in others)
    named = any(is_label_name(name) or names_split(name) for name in (*flags, *others))
    return [] if len(flags) < 2 or unclear or named else flags


_KINDS = (
    (r"u?int\d+", "number"),
    (r"(large_)?string(_view)?", "text"),
    (r"bool", "truth value"),
)
"""Types of columns that can hold labels, with their names in messages."""


LIST = "list of "
"""Beginning of the kind of a column of lists."""


def inner_type(feature: Any) -> Any:
    """Return the type of the elements of a list, or the type itself."""
    import datasets

    return feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature


def kind_of(feature: Any) -> str | None:
    """Return the kind of labels that a column holds, in words; None if it cannot hold labels."""
    import datasets

    if isinstance(feature, (datasets.List, datasets.LargeList)):
        kind = kind_of(feature.feature)
        return None if kind is None or kind.startswith(LIST) else f"{LIST}{kind}"
    if isinstance(feature, datasets.ClassLabel):
        return "class label"
    kind = str(getattr(feature, "dtype", "")) if isinstance(feature, datasets.Value) else ""
    return next((name for pattern, name in _KINDS if re.fullmatch(pattern, kind)), None)


def describe_columns(features: dict[str, Any]) -> str:
    """Return the columns with their types, for a message."""
    return listing(f"{name} ({type_name(kind)})" for name, kind in features.items())


def type_name(kind: Any) -> str:
    """Return the type of a column for a message."""
    return printable(getattr(kind, "dtype", None) or type(kind).__name__)
