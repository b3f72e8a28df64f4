"""Splits that are read in place: their shards, and the row groups of each, which are read one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow

Row = tuple[dict[str, Any], int | str | None]
"""An encoded image (`bytes`, or a `path` if there are none) and its label, as it is stored."""

RANDOM_GROUP = 16
"""Rows of a group where every row can be read by itself."""


class Shard(Protocol):
    """Rows that are stored together."""

    @property
    def groups(self) -> np.ndarray:
        """Rows of each row group; a group is read as a whole."""

    def read(self, first: int, last: int, label_column: str, image_column: str | None) -> Sequence[Row]:
        """Read the rows from `first` up to `last`, which is not included.

        Args:
            first: The first row.
            last: The row after the last one.
            label_column: Column of the labels.
            image_column: Column of the images; None if only labels are needed.

        Raises:
            OSError, HTTPError: If they cannot be read.
            ValueError: If the shard is damaged, or has changed.
        """


@dataclass(frozen=True, eq=False)
class StreamedTable:
    """The shards of a split, and the description of its columns."""

    features: dict[str, Any]
    shards: tuple[Shard, ...]

    def cast_column(self, column: str, feature: Any) -> "StreamedTable":
        """Return the table with another description of a column."""
        return replace(self, features=self.features | {column: feature})


@dataclass(frozen=True, eq=False)
class ListedShard:
    """Images in files of their own."""

    rows: tuple[Row, ...]

    @property
    def groups(self) -> np.ndarray:
        """A single group."""
        return np.array([len(self.rows)])

    def read(self, first: int, last: int, label_column: str, image_column: str | None) -> Sequence[Row]:
        """Return the rows."""
        return self.rows[first:last]


def listed_shards(rows: Sequence[Row]) -> tuple[ListedShard, ...]:
    """Return shards of a few images each, so that images are shuffled well."""
    return tuple(ListedShard(tuple(rows[i : i + RANDOM_GROUP])) for i in range(0, len(rows), RANDOM_GROUP))


def group_rows(count: int) -> np.ndarray:
    """Return the groups of a number of rows that can be read one by one."""
    return np.diff(np.append(np.arange(0, count, RANDOM_GROUP), count))


NOTHING: dict[str, Any] = {"bytes": None, "path": None}
"""An image that is missing."""


def stored_row(row: "pyarrow.StructScalar") -> dict[str, Any]:
    """Return an encoded image of a table; its path may be any bytes, because parquet does not check that it is text."""
    try:
        return row.as_py() or NOTHING
    except UnicodeDecodeError:
        path = row["path"].as_buffer().to_pybytes()
        return {"bytes": row["bytes"].as_py(), "path": path.decode("utf-8", "surrogateescape")}
