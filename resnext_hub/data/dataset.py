"""A source of labelled pictures: the bundled digits, a folder, parquet files, or a dataset on the Hub.

Everything becomes two sets of pictures, one to train on and one to evaluate on, with the class names they share:
`Pictures`, each of which is at hand by its index, or `StreamedPictures`, which are read in order.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from huggingface_hub.errors import HTTPError
from PIL import Image

from resnext_hub.data.columns import class_names, find_image_column, find_label_column, listing, read_labels
from resnext_hub.data.decode import UnreadablePictureError, decode
from resnext_hub.data.sources import (
    EVAL_NAMES,
    TRAIN_NAMES,
    is_hub_id,
    load_digits_table,
    load_folder,
    load_from_hub,
    load_parquet,
    parquet_files,
)
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.settings import Range, check_fields

if TYPE_CHECKING:
    import datasets

BUNDLED = "digits"
"""Name of the bundled dataset: scikit-learn's 1,797 handwritten digits of 8x8 pixels."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures come from."""

    dataset: str = BUNDLED
    """The bundled `digits`, a folder of class folders, parquet files, or a dataset id on the Hub."""
    dataset_config: str | None = None
    """Configuration (subset) of a Hub dataset that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub dataset; its newest commit if not given."""
    train_split: str | None = None
    """Split to train on; found by its name if not given."""
    eval_split: str | None = None
    """Split to evaluate on; found by its name if not given, and cut from the training split if there is none."""
    image_column: str | None = None
    """Column that holds the pictures; found by its type if not given."""
    label_column: str | None = None
    """Column that holds the classes; found by its type if not given."""
    eval_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Part of the training split that is held out, stratified by class, where there is no evaluation split."""
    split_seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of that cut; apart from `seed`, so that runs with other seeds are measured on the same pictures."""

    max_bad_fraction: Annotated[float, Range(0, 1)] = 0.01
    """Part of a split that may be unreadable before the run stops; a single picture never stops it."""
    streaming: bool = False
    """Read a Hub dataset or parquet files in order instead of keeping them on the disk; needs an evaluation split."""
    shuffle_block: Annotated[int, Range(1, 10_000_000)] = 1000
    """With streaming: how many consecutive samples are held and shuffled among themselves."""

    def __post_init__(self) -> None:
        check_fields(self)


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
        """Name a picture for people: the end of its path, or its index in the source."""
        path = self.row(index)["path"]
        return "/".join(Path(path).parts[-2:]) if path else f"index {self.indices[index]}"

    def row(self, index: int) -> dict[str, Any]:
        """Give a picture as it is stored: `bytes`, or a `path` where there are none."""
        # from the table itself: what datasets does around it takes as long as a tenth of decoding a picture
        row: dict[str, Any] = self.rows.data.column(self.image_column)[int(self.indices[index])].as_py()
        return row


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
        return "/".join(Path(path).parts[-2:]) if path else f"shard {self.shard}, record {self.number}"


@dataclass(frozen=True, eq=False)
class StreamedPictures:
    """Labelled pictures that are read in order, shard by shard."""

    rows: "datasets.IterableDataset"
    image_column: str
    label_column: str
    classes: int
    count: int | None
    """Number of pictures as the source states it."""

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
                    yield Record(int(shard), number, row, label)
                    number += 1

    def _batches(self, shard: int) -> Iterator[dict[str, list[Any]]]:
        # by `iter`, since a plain loop would leave out other shards in each of several reading processes
        rows = self.rows.shard(num_shards=self.shards, index=int(shard)).iter(batch_size=16)
        try:
            yield from rows
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
        path = record.row["path"]
        if record.row["bytes"] is not None or path is None or "://" not in path:
            return record.row
        from datasets.utils.file_utils import xopen

        try:
            with xopen(path, "rb") as file:
                return {"bytes": file.read(), "path": path}
        except FileNotFoundError as error:
            raise UnreadablePictureError("the file is gone") from error
        except OSError as error:
            raise RunError(
                f"{'/'.join(Path(path).parts[-2:])} could not be fetched ({one_line(error)}); the same command goes "
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


def check_source(config: DataConfig) -> None:
    """Refuse what is neither here nor can be on the Hub, before anything is fetched.

    Raises:
        RequestError: If it is so.
    """
    here = config.dataset == BUNDLED or Path(config.dataset).expanduser().exists()
    if not here and not is_hub_id(config.dataset):
        raise RequestError(f"there is no folder or file {config.dataset}, and it is no dataset id of the Hub either")


def load_splits(config: DataConfig) -> Splits:
    """Open a source and find its splits, columns and classes; pictures are decoded later, one by one.

    Raises:
        RequestError: If there is no such source, split or column, or if its labels cannot train a classifier.
        RunError: If the Hub cannot be reached.
    """
    check_source(config)
    path = Path(config.dataset).expanduser()
    hub_id = revision = None
    files: list[tuple[str, int]] = []
    stated: dict[str, int] = {}
    tables: dict[str, Any]
    if config.streaming and (config.dataset == BUNDLED or (path.is_dir() and not parquet_files(path))):
        raise RequestError(
            f"--streaming goes with a Hub dataset or parquet files; {config.dataset} is read in place as it is"
        )
    if config.dataset == BUNDLED:
        tables = {"train": load_digits_table()}
    elif path.is_file() or (path.is_dir() and parquet_files(path)):
        tables = load_parquet(path, config.streaming)
        files = [(file.name, file.stat().st_size) for file in parquet_files(path)]
    elif path.is_dir():
        tables, files = load_folder(path)
    else:
        tables, revision, stated = load_from_hub(
            config.dataset, config.dataset_config, config.dataset_revision, config.streaming
        )
        hub_id = config.dataset
    if hub_id is None and (config.dataset_config or config.dataset_revision):
        raise RequestError("--dataset-config and --dataset-revision go with a dataset on the Hub")

    train_split = _pick_split(tables, config.train_split, TRAIN_NAMES, "--train-split")
    if train_split is None and len(tables) == 1:
        train_split = next(iter(tables))
    if train_split is None:
        raise RequestError(
            f"{config.dataset} has no split called train: it has {listing(tables)}; name one with --train-split"
        )
    eval_split = _pick_split(tables, config.eval_split, EVAL_NAMES, "--eval-split")
    if eval_split == train_split and config.eval_split is None:
        eval_split = None

    train_table = tables[train_split]
    eval_table = None if eval_split is None else tables[eval_split]
    image_column, train_table, eval_table = find_image_column(
        config.dataset, config.image_column, train_table, eval_table
    )
    label_column = find_label_column(config.dataset, config.label_column, train_table, image_column)
    found: dict[str, Any] = dict(
        dataset_id=hub_id or (BUNDLED if config.dataset == BUNDLED else path.resolve().name),
        hub_id=hub_id,
        revision=revision,
        found=replace(
            config,
            dataset=config.dataset if hub_id or config.dataset == BUNDLED else str(path.resolve()),
            train_split=train_split,
            eval_split=eval_split,
            image_column=image_column,
            label_column=label_column,
        ),
    )
    if config.streaming:
        if eval_table is None:
            raise RequestError(
                f"--streaming needs an evaluation split, as nothing can be held out of what is not at hand; "
                f"{config.dataset} has {listing(tables)}: name one with --eval-split"
            )
        label_names = class_names(config.dataset, label_column, train_table, eval_table)
        streams = [
            StreamedPictures(
                table.select_columns([image_column, label_column]),
                image_column,
                label_column,
                len(label_names),
                stated.get(split),
            )
            for split, table in ((train_split, train_table), (str(eval_split), eval_table))
        ]
        nothing = np.empty(0, dtype=np.int64)
        return Splits(
            train=streams[0],
            eval=streams[1],
            label_names=label_names,
            fingerprint=_fingerprint(label_names, nothing, nothing, [*files, (revision or "", 0)]),
            **found,
        )
    label_names, train_labels, eval_labels = read_labels(config.dataset, label_column, train_table, eval_table)

    def pictures(table: "datasets.Dataset", indices: np.ndarray, labels: np.ndarray) -> Pictures:
        return Pictures(table.select_columns([image_column]), image_column, indices, labels)

    if eval_table is None or eval_labels is None:
        kept, held_out = _stratified_cut(train_labels, config.eval_fraction, config.split_seed)
        train = pictures(train_table, kept, train_labels[kept])
        evaluation = pictures(train_table, held_out, train_labels[held_out])
    else:
        train = pictures(train_table, np.arange(len(train_labels)), train_labels)
        evaluation = pictures(eval_table, np.arange(len(eval_labels)), eval_labels)
    return Splits(
        train=train,
        eval=evaluation,
        label_names=label_names,
        fingerprint=_fingerprint(label_names, train.labels, evaluation.labels, files),
        **found,
    )


def _pick_split(
    tables: dict[str, "datasets.Dataset"], asked: str | None, names: Sequence[str], flag: str
) -> str | None:
    if asked is not None:
        if asked not in tables:
            raise RequestError(f"{flag} {asked}: there is no such split, but {listing(tables)}")
        return asked
    by_lower = {split.lower(): split for split in tables}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _stratified_cut(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut indices into those kept for training and those held out, in the same proportion in every class.

    A class with one picture keeps it for training.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    divisible = np.flatnonzero(counts[labels] > 1)
    try:
        _, held_out = train_test_split(
            divisible,
            test_size=fraction,
            stratify=labels[divisible],
            random_state=np.random.RandomState(seed),
        )
    except ValueError as error:
        raise RequestError(
            f"{len(labels)} pictures of {np.count_nonzero(counts)} classes are too few to hold out a part of "
            f"{fraction} with every class in it ({one_line(error)}); raise --eval-fraction or give an evaluation split"
        ) from error
    held_out = np.sort(held_out)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _fingerprint(
    names: Sequence[str], train: np.ndarray, evaluation: np.ndarray, files: Sequence[tuple[str, int]]
) -> str:
    digest = hashlib.sha256(json.dumps([list(names), list(files)]).encode())
    for labels in (train, evaluation):
        digest.update(len(labels).to_bytes(8, "little"))
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
