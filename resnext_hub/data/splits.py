"""Load the training and evaluation splits of a dataset, with the class names that they share."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.columns import LabelledTable, class_names, find_image_column, find_label_column, read_labels
from resnext_hub.data.config import DataConfig as DataConfig
from resnext_hub.data.exclude import read_exclusions
from resnext_hub.data.holdout import likely_mistakes, stratified_split
from resnext_hub.data.images import IndexedImages, StreamedImages
from resnext_hub.data.sources import BUNDLED, OpenDataset, Request, open_source
from resnext_hub.data.sources import check_source as check_source
from resnext_hub.data.sources.names import Role, likely_splits, loose_role
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of a dataset, and everything that was resolved while loading it."""

    train: IndexedImages | StreamedImages
    eval: IndexedImages | StreamedImages
    label_names: tuple[str, ...]
    dataset_id: str
    """Hub ID, `digits`, or the last part of a local path."""
    hub_id: str | None
    revision: str | None
    """Commit of a Hub dataset."""
    fingerprint: str
    """SHA-256 of class names, label sequences and, for a folder, the names and sizes of its files."""
    found: DataConfig
    """The configuration with its open fields filled in."""
    source_digest: str | None = None
    """SHA-256 that identifies the rows of the dataset as it is stored; None for a stream."""


def load_splits(config: DataConfig) -> Splits:
    """Open a dataset and find its splits, columns and classes; images are decoded later, one by one.

    Raises:
        RequestError: If the dataset, split or column does not exist, or the labels cannot train a classifier.
        RunError: If the Hub cannot be reached.
    """
    source = open_source(config)
    name = printable(config.dataset)
    for note in source.notes:
        _logger.info("%s: %s", name, note)
    train_split, eval_split = _find_splits(config, source.tables)
    unused = [split for split in source.tables if split not in (train_split, eval_split)]
    if unused:
        _logger.info("%s: unused splits: %s", name, listing(unused))
    train, evaluation, image_column, label_column = _labelled(config, source, train_split, eval_split)
    found = _found(config, source, train_split, eval_split, image_column, label_column)
    if config.streaming:
        return _streamed(source, found, train, evaluation)
    return _indexed(config, source, found, train, evaluation)


def _labelled(
    config: DataConfig, source: OpenDataset, train_split: str, eval_split: str | None
) -> tuple[LabelledTable, LabelledTable | None, str, str]:
    """Return the tables of both splits with undecoded images, and their image and label columns."""
    name = printable(config.dataset)
    train_table = source.tables[train_split]
    eval_table = None if eval_split is None else source.tables[eval_split]
    image_column, train_table, eval_table = find_image_column(name, config.image_column, train_table, eval_table)
    label_column = find_label_column(name, config.label_column, train_table, image_column)
    train = LabelledTable("training", train_table, source.parts.get(train_split, ()))
    if eval_table is None or eval_split is None:
        return train, None, image_column, label_column
    return (
        train,
        LabelledTable("evaluation", eval_table, source.parts.get(eval_split, ())),
        image_column,
        label_column,
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The identity of a dataset, and the configuration with its open fields filled in."""

    dataset_id: str
    hub_id: str | None
    revision: str | None
    config: DataConfig
    image_column: str
    label_column: str
    train_split: str
    eval_split: str | None

    def splits(
        self,
        train: IndexedImages | StreamedImages,
        evaluation: IndexedImages | StreamedImages,
        label_names: tuple[str, ...],
        fingerprint: str,
    ) -> Splits:
        """Return the splits."""
        return Splits(
            train=train,
            eval=evaluation,
            label_names=label_names,
            dataset_id=self.dataset_id,
            hub_id=self.hub_id,
            revision=self.revision,
            fingerprint=fingerprint,
            found=self.config,
        )


def _found(
    config: DataConfig,
    source: OpenDataset,
    train_split: str,
    eval_split: str | None,
    image_column: str,
    label_column: str,
) -> _Found:
    request = Request(config)
    path = request.path
    hub_id = config.dataset if path is None and not request.is_bundled else None
    # a link to a file may have the suffix and the neighbors that its target lacks
    place = path if path is None else path.resolve() if path.is_dir() else path.absolute()
    return _Found(
        dataset_id=hub_id or (BUNDLED if place is None else printable(place.name)),
        hub_id=hub_id,
        revision=source.revision,
        config=replace(
            config,
            dataset=config.dataset if path is None else str(place),
            dataset_config=config.dataset_config or source.configuration,
            train_split=train_split,
            eval_split=eval_split,
            image_column=image_column,
            label_column=label_column,
            exclude=config.exclude and os.path.abspath(os.path.expanduser(config.exclude)),
        ),
        image_column=image_column,
        label_column=label_column,
        train_split=train_split,
        eval_split=eval_split,
    )


def _streamed(source: OpenDataset, found: _Found, train: LabelledTable, evaluation: LabelledTable | None) -> Splits:
    name = printable(found.config.dataset)
    if found.config.exclude is not None:
        raise RequestError(f"{setting('exclude')} is not possible with {setting('streaming', True)}; omit one of them")
    if evaluation is None:
        raise RequestError(
            f"{setting('streaming', True)} needs an evaluation split, because none can be held out from a stream; "
            f"{name} has {'the split' if len(source.tables) == 1 else 'the splits'} {listing(source.tables)}; choose "
            f"one with {setting('eval_split')}"
        )
    label_names = class_names(name, found.label_column, train, evaluation)
    streams = [
        StreamedImages(
            labelled.table.select_columns([found.image_column, found.label_column]),
            found.image_column,
            found.label_column,
            len(label_names),
            source.stated.get(split),
            source.roots,
        )
        for split, labelled in ((found.train_split, train), (str(found.eval_split), evaluation))
    ]
    nothing = np.empty(0, dtype=np.int64)
    fingerprint = _fingerprint(label_names, nothing, nothing, [*source.files, (source.revision or "", 0)])
    return found.splits(streams[0], streams[1], label_names, fingerprint)


def _indexed(
    config: DataConfig, source: OpenDataset, found: _Found, train: LabelledTable, evaluation: LabelledTable | None
) -> Splits:
    name, column = printable(config.dataset), found.image_column
    label_names, train_labels, eval_labels = read_labels(name, found.label_column, train, evaluation)
    digest = _digest_of(source, found.train_split, train_labels)
    excluded = read_exclusions(config.exclude)
    excluded.require_dataset(digest, source.tables)

    def images(split: str, table: "datasets.Dataset", rows: np.ndarray, labels: np.ndarray) -> IndexedImages:
        rows = rows[excluded.kept(split, len(labels))[rows]]
        if not len(rows):
            raise RequestError(f"{setting('exclude')} lists all images of {printable(split)}")
        return IndexedImages(table.select_columns([column]), column, rows, labels[rows], source.roots)

    if evaluation is None or eval_labels is None:
        # split first, so that leaving an image out does not move others between the two parts
        rows, held_out = stratified_split(train_labels, config.eval_fraction, config.split_seed)
        to_train = images(found.train_split, train.table, rows, train_labels)
        to_evaluate = images(found.train_split, train.table, held_out, train_labels)
    else:
        to_train = images(found.train_split, train.table, np.arange(len(train_labels)), train_labels)
        eval_rows = np.arange(len(eval_labels))
        to_evaluate = images(str(found.eval_split), evaluation.table, eval_rows, eval_labels)
    for mistake in likely_mistakes(label_names, to_train.labels, to_evaluate.labels):
        _logger.warning("%s: %s", name, mistake)
    left_out = [
        (f"excluded from {split}", row) for split, rows in sorted(excluded.rows.items()) for row in sorted(rows)
    ]
    fingerprint = _fingerprint(label_names, to_train.labels, to_evaluate.labels, [*source.files, *left_out])
    return replace(found.splits(to_train, to_evaluate, label_names, fingerprint), source_digest=digest)


def _digest_of(source: OpenDataset, train_split: str, labels: np.ndarray) -> str:
    """Return a digest of a dataset as it is stored, for lists of its rows: the same for any choice of other splits."""
    facts = [(train_split, len(labels)), (source.revision or "", 0), *source.files]
    return _fingerprint((), labels, np.empty(0, dtype=np.int64), facts)


def _find_splits(config: DataConfig, tables: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the splits to train and to evaluate on, the latter None if it has to be held out from the former.

    Raises:
        RequestError: If a requested split does not exist, both are the same, or none is for training.
    """
    train = _pick_split(tables, config.train_split, "train")
    only = next(iter(tables)) if len(tables) == 1 else None
    if train is None and only is not None:
        if loose_role(only) == "eval":
            raise RequestError(
                f"{printable(config.dataset)} has no training split, only {printable(only)}; use "
                f"{setting('train_split', only)} to train on it and hold out part of it for evaluation"
            )
        train = only
    if train is None:
        raise RequestError(
            f"{printable(config.dataset)} has no split called train; choose one of {listing(tables)} with "
            f"{setting('train_split')}"
        )
    evaluation = _pick_split(tables, config.eval_split, "eval")
    if evaluation == train and config.eval_split is not None:
        raise RequestError(
            f"{setting('eval_split', evaluation)} is also the training split; choose another, or omit it to hold out "
            "part of the training split"
        )
    return train, None if evaluation == train else evaluation


def _pick_split(tables: Mapping[str, Any], requested: str | None, role: Role) -> str | None:
    if requested is not None and requested not in tables:
        raise RequestError(f"{setting(f'{role}_split', requested)}: no such split; choose one of {listing(tables)}")
    found = likely_splits(tables, role)
    if requested is None and len(found) > 1:
        raise RequestError(
            f"the dataset has several {'training' if role == 'train' else 'evaluation'} splits ({listing(found)}); "
            f"choose one with {setting(f'{role}_split')}"
        )
    return requested or next(iter(found), None)


def _fingerprint(
    names: Sequence[str], train: np.ndarray, evaluation: np.ndarray, files: Sequence[tuple[str, int]]
) -> str:
    digest = hashlib.sha256(json.dumps([list(names), list(files)]).encode())
    for labels in (train, evaluation):
        digest.update(len(labels).to_bytes(8, "little"))
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
