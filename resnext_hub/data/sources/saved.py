"""Folders written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

`datasets.load_from_disk` is not used, because it follows any path in `state.json`, waits for a FIFO, fails on a split
without rows, and ignores selections of rows that its older versions saved.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_hub.data.sources.parquet import DAMAGED, pointer_reason
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.walk import Tree
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import read_json, require_regular
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

_REMEDY = "save the dataset again with datasets.save_to_disk"


@dataclass(frozen=True)
class _Splits:
    """Content of `dataset_dict.json`."""

    splits: list[str]


@dataclass(frozen=True)
class _File:
    filename: str


@dataclass(frozen=True)
class _State:
    """The part of `state.json` that defines the rows."""

    _data_files: list[_File]
    _indices_data_files: list[_File] | None = None


class SavedDataset:
    """A folder written by `save_to_disk`."""

    def matches(self, request: "Request") -> bool:
        """Return whether the folder was written by save_to_disk."""
        return is_saved(request.root)

    def open(self, request: "Request") -> OpenDataset:
        """Open its splits."""
        request.require_no_streaming()
        return open_saved(request.tree)


def is_saved(root: Path) -> bool:
    """Return whether a folder was written by save_to_disk."""
    return (root / "dataset_dict.json").is_file() or all(
        (root / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def open_saved(tree: Tree) -> OpenDataset:
    """Open a saved dataset with its own columns and splits; a single table is the training split.

    Raises:
        RequestError: If it cannot be read, or a split has no rows.
    """
    root = tree.root
    return OpenDataset(
        tables={split: _open_split(split, folder) for split, folder in _folders_of(root).items()},
        files=tuple((path, os.stat(root / path).st_size) for path in tree.others),
        roots=(os.path.realpath(root),),
        notes=(f"{printable(root.name)} was written by datasets.save_to_disk",),
    )


def _folders_of(root: Path) -> dict[str, Path]:
    """Return the folder of each split."""
    stated = root / "dataset_dict.json"
    if not stated.is_file():
        return {"train": root}
    splits = read_json(stated, _Splits, _REMEDY).splits
    if not splits:
        raise RequestError(f"{printable(stated)} lists no splits; {_REMEDY}")
    for split in splits:
        _require_name(stated, split)
    return {split: root / split for split in splits}


def _open_split(split: str, folder: Path) -> "datasets.Dataset":
    """Open the files of a split in place."""
    import datasets

    stated = folder / "state.json"
    state = read_json(stated, _State, _REMEDY)
    if state._indices_data_files:
        raise RequestError(
            f"{printable(stated)} has an indices mapping in an old format that newer versions of datasets "
            "ignore; load the dataset with the old version, call flatten_indices() and save it again"
        )
    info = read_json(folder / "dataset_info.json", dict[str, Any], _REMEDY)
    files = [folder / _require_name(stated, file.filename) for file in state._data_files]
    tables = [_open_file(file) for file in files]
    if not sum(table.num_rows for table in tables):
        raise RequestError(
            f"{printable(folder)} has no rows (split {printable(split)}); save the dataset without this split"
        )
    try:
        return datasets.Dataset(datasets.table.concat_tables(tables), info=datasets.DatasetInfo.from_dict(info))
    except DAMAGED as error:
        raise _unreadable(folder, one_line(error)) from error


def _open_file(path: Path) -> "datasets.table.Table":
    """Memory-map an Arrow file and validate it, because nothing does later."""
    import datasets

    try:
        require_regular(path)
        table = datasets.table.MemoryMappedTable.from_file(str(path))
        table.validate(full=True)
    except OSError as error:
        reason = pointer_reason(path) if path.is_file() else None
        raise _unreadable(path, reason or error.strerror or one_line(error)) from error
    except DAMAGED as error:
        raise _unreadable(path, pointer_reason(path) or one_line(error)) from error
    return table


def _require_name(stated: Path, name: str) -> str:
    """Return a name if it is that of a file or folder beside `stated`, not a path to elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise RequestError(f"{printable(stated)} lists {printable(name)}, which is not a file name; {_REMEDY}")
    return name


def _unreadable(path: Path, reason: str) -> RequestError:
    return RequestError(f"{printable(path)}, saved by datasets.save_to_disk, cannot be read: {reason}; {_REMEDY}")
