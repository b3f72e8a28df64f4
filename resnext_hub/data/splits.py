"""Load the splits of a dataset for training, evaluation and test, with the class names that they share."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal

import numpy as np

from resnext_hub.data.columns import find_image_column, find_label_column
from resnext_hub.data.config import NO_TEST
from resnext_hub.data.config import DataConfig as DataConfig
from resnext_hub.data.exclude import read_exclusions
from resnext_hub.data.groups import duplicates_in
from resnext_hub.data.holdout import divide, likely_mistakes, similar_names, strata_of
from resnext_hub.data.images import IndexedImages, StreamedImages
from resnext_hub.data.labels import LabelledTable, class_names, read_labels
from resnext_hub.data.sources import BUNDLED, OpenDataset, Request, is_url, open_source, public_name
from resnext_hub.data.sources import check_source as check_source
from resnext_hub.data.sources.names import likely_splits, loose_role
from resnext_hub.data.sources.streamed import StreamedTable
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable

_logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 10_000
"""Files of a dataset that are written as JSON together for its fingerprint."""


MOST_GROUPED = 100_000
"""Most images of a split that is searched for duplicates by default; the time grows faster than their number."""

Images = IndexedImages | StreamedImages
"""The images of a split."""


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of a dataset, and everything that was resolved while loading it."""

    train: Images
    eval: Images
    label_names: tuple[str, ...]
    dataset_id: str
    """Hub ID, `digits`, a URL without secrets, or the last part of a local path."""
    hub_id: str | None
    revision: str | None
    """Commit of a Hub dataset."""
    fingerprint: str
    """SHA-256 of class names, label sequences and, for a folder, the names and sizes of its files."""
    found: DataConfig
    """The configuration with its open fields filled in."""
    test: Images | None = None
    """Images that are evaluated once, at the end of a run; None if there are none."""
    stored: tuple[str, ...] = ()
    """All splits of the dataset, used or not."""
    source_digest: str | None = None
    """SHA-256 that identifies the rows of the dataset as it is stored; None for a stream."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have any number of labels, instead of exactly one."""
        return self.train.is_multi_label

    @property
    def evaluated(self) -> dict[str, Images]:
        """The splits that are not trained on, by their part in a run."""
        return {"evaluation": self.eval} if self.test is None else {"evaluation": self.eval, "test": self.test}

    def stored_in(self, part: str) -> str | None:
        """Return the stored split of the `evaluation` or the `test` part; None if it is held out, or missing."""
        split = self.found.eval_split if part == "evaluation" else self.found.test_split
        return None if split == NO_TEST else split


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """Names of the stored splits by what they are used for; None for a part that is held out, or a missing test."""

    train: str
    eval: str | None
    test: str | None

    def used(self) -> dict[str, str]:
        """Return the stored splits by part: `training`, and `evaluation` and `test` if they are stored."""
        named = {"training": self.train, "evaluation": self.eval, "test": self.test}
        return {part: split for part, split in named.items() if split is not None}


def load_splits(config: DataConfig) -> Splits:
    """Open a dataset and find its splits, columns and classes; images are decoded later, one by one.

    Raises:
        RequestError: If the dataset, split or column does not exist, or the labels cannot train a classifier.
        RunError: If the Hub cannot be reached.
    """
    source = open_source(config)
    name = printable(public_name(config.dataset))
    for note in source.notes:
        _logger.info("%s: %s", name, note)
    roles = _find_splits(config, source.tables)
    try:
        splits = _load(config, source, roles)
    except RequestError as error:
        if roles.test is None or config.test_split is not None:
            raise
        # a test split without labels is common, because benchmarks keep them secret
        splits = _load(config, source, replace(roles, test=None))
        _logger.warning("%s: the %s split is not used for a test: %s", name, printable(roles.test), error)
        roles = replace(roles, test=None)
    splits = replace(splits, stored=tuple(source.tables))
    unused = [split for split in source.tables if split not in roles.used().values()]
    if unused:
        _logger.info("%s: unused splits: %s", name, listing(unused))
    return splits


def _load(config: DataConfig, source: OpenDataset, roles: _Roles) -> Splits:
    name = printable(public_name(config.dataset))
    stored = {part: source.tables[split] for part, split in roles.used().items()}
    image_column, tables = find_image_column(name, config.image_column, stored)
    label_column = find_label_column(name, config.label_column, tables["training"], image_column)
    labelled = [LabelledTable(part, tables[part], source.parts.get(split, ())) for part, split in roles.used().items()]
    found = _found(config, source, roles, image_column, label_column)
    return _streamed(source, found, labelled) if config.streaming else _indexed(source, found, labelled)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The identity of a dataset, and the configuration with its open fields filled in."""

    dataset_id: str
    hub_id: str | None
    revision: str | None
    config: DataConfig
    roles: _Roles
    image_column: str
    label_column: str

    def splits(self, images: Mapping[str, Images], label_names: tuple[str, ...], fingerprint: str) -> Splits:
        """Return the splits."""
        return Splits(
            train=images["training"],
            eval=images["evaluation"],
            test=images.get("test"),
            label_names=label_names,
            dataset_id=self.dataset_id,
            hub_id=self.hub_id,
            revision=self.revision,
            fingerprint=fingerprint,
            found=self.config,
        )


def _found(config: DataConfig, source: OpenDataset, roles: _Roles, image_column: str, label_column: str) -> _Found:
    request = Request(config)
    path = request.path
    asked = public_name(config.dataset)
    hub_id = config.dataset if path is None and not request.is_bundled and not is_url(config.dataset) else None
    # a link to a file may have the suffix and the neighbors that its target lacks
    place = path if path is None else path.resolve() if path.is_dir() else path.absolute()
    return _Found(
        dataset_id=hub_id or printable(place.name if place is not None else BUNDLED if request.is_bundled else asked),
        hub_id=hub_id,
        revision=source.revision,
        config=replace(
            config,
            dataset=asked if path is None else str(place),
            dataset_config=config.dataset_config or source.configuration,
            train_split=roles.train,
            eval_split=roles.eval,
            test_split=None if config.test_fraction else roles.test or NO_TEST,
            image_column=image_column,
            label_column=label_column,
            group_duplicates=_groups(config, roles, source),
            exclude=config.exclude and os.path.abspath(os.path.expanduser(config.exclude)),
        ),
        roles=roles,
        image_column=image_column,
        label_column=label_column,
    )


def _groups(config: DataConfig, roles: _Roles, source: OpenDataset) -> bool:
    """Return whether to keep duplicates together.

    Raises:
        RequestError: If that is requested, but no images are held out.
    """
    holds_out = not config.streaming and (roles.eval is None or config.test_fraction > 0)
    if config.group_duplicates and not holds_out:
        raise RequestError(
            f"{setting('group_duplicates', True)} has no effect, because no images of "
            f"{printable(public_name(config.dataset))} are held out; omit it (resnext-hub check finds duplicates "
            "across stored splits)"
        )
    if config.group_duplicates is not None or not holds_out:
        return bool(config.group_duplicates)
    table = source.tables[roles.train]
    assert not isinstance(table, StreamedTable)
    count = len(table)
    if count > MOST_GROUPED:
        _logger.warning(
            "%s: images are held out without a search for duplicates, which would take a long time for %d images; use "
            "--group-duplicates to search anyway",
            printable(public_name(config.dataset)),
            count,
        )
    return count <= MOST_GROUPED


def _streamed(source: OpenDataset, found: _Found, labelled: Sequence[LabelledTable]) -> Splits:
    config, roles = found.config, found.roles
    name = printable(public_name(config.dataset))
    for field, needed in (("exclude", None), ("test_fraction", 0.0)):
        if getattr(config, field) != needed:
            raise RequestError(
                f"{setting(field)} cannot be combined with {setting('streaming', True)}; omit one of them"
            )
    if roles.eval is None:
        raise RequestError(
            f"{setting('streaming', True)} needs an evaluation split, because none can be held out from a stream; "
            f"{name} has {'the split' if len(source.tables) == 1 else 'the splits'} {listing(source.tables)}; choose "
            f"one with {setting('eval_split')}"
        )
    label_names = class_names(name, found.label_column, labelled)
    images = {
        part.name: StreamedImages(
            part.table.shards,
            found.image_column,
            found.label_column,
            tuple(part.described()[0].features[found.label_column].names),
            source.roots,
        )
        for part in labelled
    }
    test = images.get("test")
    if test is not None and not test.is_labelled():
        raise RequestError(f"the first images of the test split have no labels; choose another {setting('test_split')}")
    nothing = np.empty(0, dtype=np.int64)
    facts = chain(source.files, [(source.revision or "", 0)])
    return found.splits(images, label_names, _fingerprint(label_names, [nothing] * len(labelled), facts))


def _indexed(source: OpenDataset, found: _Found, labelled: Sequence[LabelledTable]) -> Splits:
    config, roles = found.config, found.roles
    name = printable(public_name(config.dataset))
    label_names, labels = read_labels(name, found.label_column, labelled)
    digest = _digest_of(source, roles.train, labels["training"])
    excluded = read_exclusions(config.exclude)
    excluded.require_dataset(digest, source.tables)
    tables = {part.name: part.table for part in labelled}

    def images(part: str, rows: np.ndarray) -> IndexedImages:
        stored = part if part in tables else "training"
        split = roles.used()[stored]
        rows = rows[excluded.kept(split, len(labels[stored]))[rows]]
        if not len(rows):
            what = printable(split) if part in tables else f"the {part} part of {printable(split)}"
            raise RequestError(f"{setting('exclude')} lists all images of {what}")
        table = tables[stored].select_columns([found.image_column])
        return IndexedImages(table, found.image_column, rows, labels[stored][rows], source.roots)

    # split first, so that leaving an image out does not move others between the parts
    rows = {part: np.arange(len(own)) for part, own in labels.items()}
    strata = strata_of(labels["training"])

    def groups() -> list[np.ndarray]:
        table = tables["training"].select_columns([found.image_column])
        everything = IndexedImages(table, found.image_column, rows["training"], labels["training"], source.roots)
        return duplicates_in(everything, digest, config.dataset_config)

    divided = divide(config, strata, rows, groups)
    parts = {part: images(part, chosen) for part, chosen in divided.items()}
    for part, chosen in parts.items():
        if part != "training":
            for mistake in likely_mistakes(label_names, parts["training"].labels, chosen.labels, part):
                _logger.warning("%s: %s", name, mistake)
    for names in similar_names(label_names):
        _logger.warning("%s: classes %s differ only in case or spaces; they are kept separate", name, listing(names))
    left_out = [
        (f"excluded from {split}", row) for split, rows in sorted(excluded.rows.items()) for row in sorted(rows)
    ]
    in_order = [parts[part].labels for part in ("training", "evaluation", "test") if part in parts]
    fingerprint = _fingerprint(label_names, in_order, chain(source.files, left_out))
    return replace(found.splits(parts, label_names, fingerprint), source_digest=digest)


def _digest_of(source: OpenDataset, train_split: str, labels: np.ndarray) -> str:
    """Return a digest of a dataset as it is stored, for lists of its rows: the same for any choice of other splits."""
    facts = chain([(train_split, len(labels)), (source.revision or "", 0)], source.files)
    return _fingerprint((), [labels, np.empty(0, dtype=np.int64)], facts)


def _find_splits(config: DataConfig, tables: Mapping[str, Any]) -> _Roles:
    """Return the splits to train, to evaluate and to test on; see `_Roles`.

    Raises:
        RequestError: If a requested split does not exist, two of them are the same, or none is for training.
    """
    train = _pick_split(tables, config.train_split, "train")
    only = next(iter(tables)) if len(tables) == 1 else None
    if train is None and only is not None:
        if loose_role(only) == "eval":
            raise RequestError(
                f"{printable(public_name(config.dataset))} has no training split, only {printable(only)}; use "
                f"{setting('train_split', only)} to train on it and hold out part of it for evaluation"
            )
        train = only
    if train is None:
        raise RequestError(
            f"{printable(public_name(config.dataset))} has no split called train; choose one of {listing(tables)} with "
            f"{setting('train_split')}"
        )
    test = None if config.test_split in (None, NO_TEST) else _pick_split(tables, config.test_split, "test")
    if test == train:
        raise RequestError(f"{setting('test_split', test)} is also the training split; choose another")
    others = [split for split in tables if split not in (train, test)]
    if config.eval_split is not None:
        evaluation = _pick_split(tables, config.eval_split, "eval")
        if evaluation == train:
            raise RequestError(
                f"{setting('eval_split', evaluation)} is also the training split; choose another, or omit it to hold "
                "out part of the training split"
            )
        if evaluation == test:
            raise RequestError(f"{setting('eval_split', evaluation)} is also the test split; choose another")
    else:
        # a split with a name such as test is for evaluation only if no other one is
        names = likely_splits(others, "test")
        validation = [split for split in others if split not in names]
        evaluation = _pick_split(validation, None, "eval") or _pick_split(others, None, "eval")
    if config.test_split is None and not config.test_fraction and evaluation is not None:
        test = _likely_test([split for split in others if split != evaluation], evaluation)
    if config.folds is not None and evaluation is not None:
        if test is None and config.test_split is None:
            test = evaluation
        evaluation = None  # each fold is evaluated with a model that is trained on the others
    return _Roles(train=train, eval=evaluation, test=test)


def _likely_test(others: Sequence[str], evaluation: str) -> str | None:
    """Return the split that is probably a test beside a validation split, if there is one."""
    found = likely_splits(others, "test")
    if likely_splits([evaluation], "test") or not found:
        return None
    if len(found) > 1:
        _logger.warning("several splits could be the test split (%s); choose one with --test-split", listing(found))
        return None
    return found[0]


def _pick_split(tables: Iterable[str], requested: str | None, role: Literal["train", "eval", "test"]) -> str | None:
    if requested is not None and requested not in tables:
        raise RequestError(f"{setting(f'{role}_split', requested)}: no such split; choose one of {listing(tables)}")
    found = likely_splits(tables, role) if requested is None else []
    if len(found) > 1:
        raise RequestError(
            f"the dataset has several {'training' if role == 'train' else 'evaluation'} splits ({listing(found)}); "
            f"choose one with {setting(f'{role}_split')}"
        )
    return requested or next(iter(found), None)


def _fingerprint(names: Sequence[str], labels: Iterable[np.ndarray], files: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256(f"[{json.dumps(list(names))}, [".encode())
    files, separator = iter(files), ""
    while some := list(islice(files, _FILES_AT_ONCE)):  # the JSON of all would take much memory
        digest.update(f"{separator}{json.dumps(some)[1:-1]}".encode())
        separator = ", "
    digest.update(b"]]")
    for split in labels:
        digest.update(len(split).to_bytes(8, "little"))
        digest.update(np.packbits(split).tobytes() if split.ndim == 2 else split.astype("<i8").tobytes())
    return digest.hexdigest()
