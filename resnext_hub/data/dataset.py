"""A source of labelled pictures: the bundled digits, a folder, parquet files, or a dataset on the Hub.

Everything becomes two sets of pictures, one to train on and one to evaluate on, with the class names they share:
`Pictures`, each of which is at hand by its index, or `StreamedPictures`, which are read in order.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from huggingface_hub.errors import HTTPError
from PIL import Image

from resnext_hub.data.columns import (
    LabelledTable,
    class_names,
    find_image_column,
    find_label_column,
    listing,
    read_labels,
)
from resnext_hub.data.config import DataConfig as DataConfig
from resnext_hub.data.decode import UnreadablePictureError, decode
from resnext_hub.data.sources import BUNDLED, bundled, local_path, open_source
from resnext_hub.data.sources import check_source as check_source
from resnext_hub.data.sources.names import Role, likely_splits, loose_role
from resnext_hub.data.sources.walk import real_path
from resnext_hub.data.splits import doubts, stratified_cut
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labelled pictures by index.

    `labels` is `(N,)` int64; `rows` gives the undecoded picture (bytes or a path) at an index of the whole source, and
    `indices` says which of those belong here; it is a table as it was loaded, with no selection of its own.
    """

    rows: "datasets.Dataset"
    image_column: str
    indices: np.ndarray
    labels: np.ndarray
    roots: tuple[str, ...] | None = None
    """Folders in which files have to lie that rows name by their paths; None if the paths were listed here."""

    def __post_init__(self) -> None:
        assert self.rows._indices is None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def count(self) -> int | None:
        """Number of pictures."""
        return len(self)

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """Decode a picture.

        Raises:
            UnreadablePictureError: If it cannot be decoded; the message is the reason.
        """
        return decode(self.row(index), mode)

    def name(self, index: int) -> str:
        """Return a name for people: the end of its path, or its index in the source.

        Images of a table may all have the same path, so the index stands beside it there; count by index.
        """
        row = self._stored(index)
        place = f"index {self.indices[index]}"
        if not row["path"]:
            return place
        return short_name(row["path"]) if row["bytes"] is None else f"{short_name(row['path'])} ({place})"

    def row(self, index: int) -> dict[str, Any]:
        """Return an image as it is stored: `bytes`, or a `path` where there are none.

        Raises:
            UnreadablePictureError: If the path leads out of the dataset's folder.
        """
        return located(self._stored(index), self.roots)

    def _stored(self, index: int) -> dict[str, Any]:
        # from the table itself: what datasets does around it takes as long as a tenth of decoding an image
        row = self.rows.data.column(self.image_column)[int(self.indices[index])]
        try:
            return row.as_py() or {"bytes": None, "path": None}
        except UnicodeDecodeError:  # parquet stores text of any bytes
            path = row["path"].as_buffer().to_pybytes()
            return {"bytes": row["bytes"].as_py(), "path": path.decode("utf-8", "surrogateescape")}


def short_name(path: str) -> str:
    """Return the last two parts of a stored path, printable."""
    return printable("/".join(Path(real_path(path)).parts[-2:]))


def located(row: dict[str, Any], roots: tuple[str, ...] | None) -> dict[str, Any]:
    """Return a stored image with the path of its file on this machine.

    Args:
        row: `bytes`, or a `path` where there are none, which somebody else may have written.
        roots: Folders in which the file has to lie, links followed, or beginnings of addresses; None trusts the path,
            which then is as `stored_path` made it.

    Raises:
        UnreadablePictureError: If it lies elsewhere.
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
    raise UnreadablePictureError("its path leads out of the dataset's folder")


class Record(NamedTuple):
    """A sample of a stream: which one it is, the undecoded picture, and its label."""

    shard: int
    number: int
    """Place within the shard."""
    row: dict[str, Any]
    label: int

    @property
    def key(self) -> int:
        """One number that says which sample it is."""
        return self.shard << 32 | self.number

    @property
    def name(self) -> str:
        """Name the sample for people."""
        path = self.row["path"]
        place = f"shard {self.shard}, record {self.number}"
        return f"{short_name(path)} ({place})" if path else place


@dataclass(frozen=True, eq=False)
class StreamedPictures:
    """Labelled pictures that are read in order, shard by shard."""

    rows: "datasets.IterableDataset"
    image_column: str
    label_column: str
    classes: int
    count: int | None
    """Number of pictures as the source states it."""
    roots: tuple[str, ...] | None = ()
    """Folders, or beginnings of addresses, in which files have to lie that rows name by their paths."""

    @property
    def shards(self) -> int:
        """Number of files, or parts of them, that can be read apart."""
        return int(self.rows.num_shards)

    def read(self, shards: Sequence[int]) -> Iterator[Record]:
        """Read shards one after the other.

        Raises:
            RunError: If a label is out of range, or the source cannot be reached any more.
        """
        for shard in shards:
            number = 0
            for batch in self._batches(shard):
                for row, label in zip(batch[self.image_column], batch[self.label_column], strict=True):
                    if label is None or not 0 <= label < self.classes:
                        raise RunError(
                            f"record {number} of shard {shard} has the label {label}: expected 0 to {self.classes - 1}"
                        )
                    yield Record(int(shard), number, row or {"bytes": None, "path": None}, label)
                    number += 1

    def _batches(self, shard: int) -> Iterator[dict[str, list[Any]]]:
        # by `iter`, since a plain loop would leave out other shards in each of several reading processes
        rows = self.rows.shard(num_shards=self.shards, index=int(shard)).iter(batch_size=16)
        try:
            yield from rows
        except UnicodeDecodeError as error:
            raise RunError(
                f"shard {shard} holds text that is not valid UTF-8 ({one_line(error)}), which cannot be streamed; "
                "leave out --streaming, or write the file again"
            ) from error
        except (HTTPError, OSError, ValueError) as error:  # the last is what the reader of broken parquet raises
            raise RunError(
                f"the stream broke off in shard {shard} ({one_line(error)}); the same command goes on from the last "
                "checkpoint"
            ) from error

    def image(self, record: Record, mode: str = "RGB") -> Image.Image:
        """Decode a picture.

        Raises:
            UnreadablePictureError: If it cannot be decoded; the message is the reason.
        """
        return decode(self.row(record), mode)

    def row(self, record: Record) -> dict[str, Any]:
        """Give a picture as it is stored, with the bytes of a file that is in a repository or an archive of it.

        Raises:
            UnreadablePictureError: If that file is gone.
            RunError: If it cannot be fetched.
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
            raise UnreadablePictureError("the file is gone") from error
        except OSError as error:
            raise RunError(
                f"{short_name(path)} could not be fetched ({one_line(error)}); the same command goes "
                "on from the last checkpoint"
            ) from error


@dataclass(frozen=True, eq=False)
class Splits:
    """What a source holds, and what was found out about it on the way."""

    train: Pictures | StreamedPictures
    eval: Pictures | StreamedPictures
    label_names: tuple[str, ...]
    dataset_id: str
    """Hub id, `digits`, or the last part of a local path."""
    hub_id: str | None
    revision: str | None
    """Commit of a Hub dataset."""
    fingerprint: str
    """SHA-256 of class names, label sequences and, for a folder, the names and sizes of its files."""
    found: DataConfig
    """The configuration with its open fields filled in."""


def load_splits(config: DataConfig) -> Splits:
    """Open a source and find its splits, columns and classes; images are decoded later, one by one.

    Raises:
        RequestError: If there is no such source, split or column, or if its labels cannot train a classifier.
        RunError: If the Hub cannot be reached.
    """
    source = open_source(config)
    path = local_path(config)
    name = printable(config.dataset)
    for note in source.notes:
        _logger.info("%s: %s", name, note)
    train_split, eval_split = _find_splits(config, source.tables)
    unused = [split for split in source.tables if split not in (train_split, eval_split)]
    if unused:
        _logger.info("%s: not used: split %s", name, listing(unused))

    train_table = source.tables[train_split]
    eval_table = None if eval_split is None else source.tables[eval_split]
    image_column, train_table, eval_table = find_image_column(name, config.image_column, train_table, eval_table)
    label_column = find_label_column(name, config.label_column, train_table, image_column)
    labelled = LabelledTable("training", train_table, source.parts.get(train_split, ()))
    eval_labelled = (
        None
        if eval_table is None or eval_split is None
        else LabelledTable("evaluation", eval_table, source.parts.get(eval_split, ()))
    )
    hub_id = config.dataset if path is None and not bundled(config) else None
    found: dict[str, Any] = dict(
        dataset_id=hub_id or (BUNDLED if path is None else printable(path.resolve().name)),
        hub_id=hub_id,
        revision=source.revision,
        found=replace(
            config,
            dataset=config.dataset if path is None else str(path.resolve()),
            dataset_config=config.dataset_config or source.configuration,
            train_split=train_split,
            eval_split=eval_split,
            image_column=image_column,
            label_column=label_column,
        ),
    )
    if config.streaming:
        if eval_labelled is None:
            raise RequestError(
                f"--streaming needs an evaluation split, as nothing can be held out of what is not at hand; "
                f"{name} has {listing(source.tables)}: name one with --eval-split"
            )
        label_names = class_names(name, label_column, labelled, eval_labelled)
        streams = [
            StreamedPictures(
                table.select_columns([image_column, label_column]),
                image_column,
                label_column,
                len(label_names),
                source.stated.get(split),
                source.roots,
            )
            for split, table in ((train_split, train_table), (str(eval_split), eval_labelled.table))
        ]
        nothing = np.empty(0, dtype=np.int64)
        return Splits(
            train=streams[0],
            eval=streams[1],
            label_names=label_names,
            fingerprint=_fingerprint(label_names, nothing, nothing, [*source.files, (source.revision or "", 0)]),
            **found,
        )
    label_names, train_labels, eval_labels = read_labels(name, label_column, labelled, eval_labelled)

    def pictures(table: "datasets.Dataset", indices: np.ndarray, labels: np.ndarray) -> Pictures:
        return Pictures(table.select_columns([image_column]), image_column, indices, labels, source.roots)

    if eval_table is None or eval_labels is None:
        kept, held_out = stratified_cut(train_labels, config.eval_fraction, config.split_seed)
        train = pictures(train_table, kept, train_labels[kept])
        evaluation = pictures(train_table, held_out, train_labels[held_out])
    else:
        train = pictures(train_table, np.arange(len(train_labels)), train_labels)
        evaluation = pictures(eval_table, np.arange(len(eval_labels)), eval_labels)
    for doubt in doubts(label_names, train.labels, evaluation.labels):
        _logger.warning("%s: %s", name, doubt)
    return Splits(
        train=train,
        eval=evaluation,
        label_names=label_names,
        fingerprint=_fingerprint(label_names, train.labels, evaluation.labels, source.files),
        **found,
    )


def _find_splits(config: DataConfig, tables: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the splits to train and to evaluate on, the latter None where it has to be cut from the former.

    Raises:
        RequestError: If a split that is asked for is not there, both are the same, or none is for training.
    """
    train = _pick_split(tables, config.train_split, "train")
    only = next(iter(tables)) if len(tables) == 1 else None
    if train is None and only is not None:
        if loose_role(only) == "eval":
            raise RequestError(
                f"{printable(config.dataset)} has no split to train on, but {printable(only)}; --train-split "
                f"{printable(only)} trains on it, and holds out a part"
            )
        train = only
    if train is None:
        raise RequestError(
            f"{printable(config.dataset)} has no split called train: it has {listing(tables)}; "
            "name one with --train-split"
        )
    evaluation = _pick_split(tables, config.eval_split, "eval")
    if evaluation == train and config.eval_split is not None:
        raise RequestError(
            f"--eval-split {printable(evaluation)} is the split to train on; name another, or leave it out to hold "
            "out a part"
        )
    return train, None if evaluation == train else evaluation


def _pick_split(tables: Mapping[str, Any], asked: str | None, role: Role) -> str | None:
    if asked is not None and asked not in tables:
        raise RequestError(f"--{role}-split {printable(asked)}: there is no such split, but {listing(tables)}")
    found = likely_splits(tables, role)
    if asked is None and len(found) > 1:
        raise RequestError(f"there are several splits of one kind ({listing(found)}); name one with --{role}-split")
    return asked or next(iter(found), None)


def _fingerprint(
    names: Sequence[str], train: np.ndarray, evaluation: np.ndarray, files: Sequence[tuple[str, int]]
) -> str:
    digest = hashlib.sha256(json.dumps([list(names), list(files)]).encode())
    for labels in (train, evaluation):
        digest.update(len(labels).to_bytes(8, "little"))
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
