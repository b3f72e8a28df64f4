"""Labeled, encoded images, by index or as a stream."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import HTTPError
from PIL import Image

from resnext_hub.data.decode import UnreadableImageError, decode
from resnext_hub.data.lanes import Piece, in_order
from resnext_hub.data.sources.streamed import Row, Shard, stored_row
from resnext_hub.data.sources.walk import real_path
from resnext_hub.errors import RunError, one_line
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class IndexedImages:
    """Labeled images by index.

    `rows` is the whole table as it was loaded, without a selection of its own; it holds encoded images (bytes or a
    path). `indices` are the rows that belong to this split, `labels` `(N,)` int64 their labels, or `(N, classes)` bool
    which of several labels each has.
    """

    rows: "datasets.Dataset"
    image_column: str
    indices: np.ndarray
    labels: np.ndarray
    roots: tuple[str, ...] | None = None
    """Folders that must contain the files that rows refer to by path; None if the paths were listed locally."""

    def __post_init__(self) -> None:
        assert self.rows._indices is None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have any number of labels, instead of exactly one."""
        return self.labels.ndim == 2

    def label(self, index: int) -> int | np.ndarray:
        """Return the label of an image, or with several labels, which it has, `(classes,)` bool."""
        return self.labels[index] if self.is_multi_label else int(self.labels[index])

    def label_set(self, index: int) -> tuple[int, ...]:
        """Return all labels of an image in ascending order."""
        return tuple(np.flatnonzero(self.labels[index]).tolist()) if self.is_multi_label else (int(self.labels[index]),)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self)

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """Decode an image.

        Raises:
            UnreadableImageError: If it cannot be decoded; the message is the reason.
        """
        return decode(self.row(index), mode)

    def name(self, index: int) -> str:
        """Return a name for messages: the end of its path, or its index in the source.

        Images stored in a table may all have the same path, so their names include the index. Count by index.
        """
        row = self._stored(index)
        place = f"index {self.indices[index]}"
        if not row["path"]:
            return place
        return short_name(row["path"]) if row["bytes"] is None else f"{short_name(row['path'])} ({place})"

    def row(self, index: int) -> dict[str, Any]:
        """Return an encoded image: `bytes`, or a `path` if there are none.

        Raises:
            UnreadableImageError: If the path leads outside the dataset's folder.
        """
        return located(self._stored(index), self.roots)

    @cached_property
    def _column(self) -> Any:
        # the Arrow column itself: indexing the Dataset would cost a tenth of the time to decode an image, and getting
        # the column again for each row would cost more the more chunks it has
        return self.rows.data.column(self.image_column)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_column"}  # `rows` contains it

    def _stored(self, index: int) -> dict[str, Any]:
        return stored_row(self._column[int(self.indices[index])])


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of images of each class, `(classes,)` int64.

    Args:
        labels: Labels of the images, `(N,)`, or `(N, classes)` bool if each can have several.
        classes: Number of classes.
    """
    return labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)


def short_name(path: str) -> str:
    """Return the last two parts of a stored path, printable."""
    return printable("/".join(Path(real_path(path)).parts[-2:]))


def located(row: dict[str, Any], roots: tuple[str, ...] | None) -> dict[str, Any]:
    """Return an encoded image with the path of its file on this machine.

    Args:
        row: `bytes`, or a `path` if there are none; the path is untrusted.
        roots: Folders that must contain the file after resolving links, or prefixes of URLs; None trusts the path,
            which then is the result of `stored_path`.

    Raises:
        UnreadableImageError: If the file is elsewhere.
    """
    path = row["path"]
    if row["bytes"] is not None or path is None:
        return row
    if roots is None:
        return {"bytes": None, "path": real_path(path)}
    if "://" in path:
        if path.rpartition("::")[2].startswith(tuple(root for root in roots if "://" in root)):
            return row
    else:
        folders = [root for root in roots if "://" not in root]
        real = os.path.realpath(os.path.join(folders[0], path)) if folders and "\0" not in path else ""
        if any(real.startswith(os.path.join(folder, "")) for folder in folders):
            return {"bytes": None, "path": real}
    raise UnreadableImageError("its path leads outside the dataset's folder")


@dataclass(frozen=True)
class Record:
    """A sample of a stream: its index in the split, its shard and number there, the encoded image, and its label."""

    index: int
    shard: int
    number: int
    row: dict[str, Any]
    label: int

    @property
    def name(self) -> str:
        """The name of the sample in messages."""
        path = self.row["path"]
        place = f"shard {self.shard}, record {self.number}"
        return f"{short_name(path)} ({place})" if path else place


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Labeled images that are read in place, from shards."""

    shards: tuple[Shard, ...]
    image_column: str
    label_column: str
    stored_names: tuple[str, ...]
    """Names of the classes as they are stored."""
    roots: tuple[str, ...] | None = ()
    """Folders, or prefixes of URLs, that must contain the files that rows refer to by path."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have any number of labels; never in a stream."""
        return False

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Rows of each row group of each shard; a row group is read as a whole."""
        return [shard.groups for shard in self.shards]

    @property
    def row_groups(self) -> int:
        """Number of row groups."""
        return sum(map(len, self.groups))

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of images before each shard, and of all images."""
        return np.cumsum([0, *(int(groups.sum()) for groups in self.groups)])

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.starts[-1])

    def read(self, pieces: Iterable[Piece]) -> list[Record]:
        """Read records.

        Raises:
            RunError: If a label is out of range, or reading fails.
        """
        return [record for piece in pieces for record in self._records(piece)]

    def records(self, first: int = 0, last: int | None = None) -> Iterator[Record]:
        """Yield the records from index `first` up to `last`, which is not included; all if not given."""
        for piece in in_order(self.groups, first, self.count if last is None else last):
            yield from self.read([piece])

    def is_labelled(self) -> bool:
        """Return whether the first records have labels that are classes."""
        rows = self._rows(Piece(0, 0, int(self.groups[0][0])), labels_only=True)
        return all(self._class_of(stored) is not None for _, stored in rows)

    def _records(self, piece: Piece) -> Iterator[Record]:
        for number, (row, stored) in enumerate(self._rows(piece), start=piece.first):
            label = self._class_of(stored)
            if label is None:
                raise RunError(
                    f"record {number} of shard {piece.shard} has the label {printable(stored)}; expected 0 to "
                    f"{len(self.stored_names) - 1}"
                )
            yield Record(int(self.starts[piece.shard]) + number, piece.shard, number, row, label)

    def _rows(self, piece: Piece, labels_only: bool = False) -> Sequence[Row]:
        shard, first, last = piece
        try:
            return self.shards[shard].read(first, last, self.label_column, None if labels_only else self.image_column)
        except (HTTPError, OSError, ValueError) as error:  # ValueError: damaged
            raise RunError(
                f"the stream was interrupted in shard {shard} ({one_line(error)}); rerun the same command to resume "
                "from the last checkpoint"
            ) from error

    def _class_of(self, stored: int | str | None) -> int | None:
        """Return the class of a stored label, which is its number or its name; None if there is none."""
        if isinstance(stored, str):
            return self._numbers.get(stored)
        return stored if stored is not None and 0 <= stored < len(self.stored_names) else None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.stored_names)}

    def image(self, record: Record, mode: str = "RGB") -> Image.Image:
        """Decode an image.

        Raises:
            UnreadableImageError: If it cannot be decoded; the message is the reason.
        """
        return decode(self.row(record), mode)

    def row(self, record: Record) -> dict[str, Any]:
        """Return an encoded image; a file in a repository, or in an archive there, is downloaded.

        Raises:
            UnreadableImageError: If the file does not exist.
            RunError: If it cannot be downloaded.
        """
        row = located(record.row, self.roots)
        path = row["path"]
        if row["bytes"] is not None or path is None or "://" not in path:
            return row
        from datasets.utils.file_utils import xopen

        try:
            with xopen(path, "rb") as file:
                return {"bytes": file.read(), "path": path}
        except FileNotFoundError as error:
            raise UnreadableImageError("the file does not exist") from error
        except OSError as error:
            raise RunError(
                f"{short_name(path)} could not be downloaded ({one_line(error)}); rerun the same command to resume "
                "from the last checkpoint"
            ) from error
