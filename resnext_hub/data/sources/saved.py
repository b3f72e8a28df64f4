"""Folders that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

They are opened by what their `state.json` lists, since `datasets.load_from_disk` would follow any path that stands
there, wait for a FIFO, fail on a split without rows, and ignore a selection of rows that its older versions saved.
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

_WAY_OUT = "save the dataset again with datasets.save_to_disk"


@dataclass(frozen=True)
class _Splits:
    """Content of `dataset_dict.json`."""

    splits: list[str]


@dataclass(frozen=True)
class _File:
    filename: str


@dataclass(frozen=True)
class _State:
    """Content of `state.json`, as far as it says which rows there are."""

    _data_files: list[_File]
    _indices_data_files: list[_File] | None = None


class SavedDataset:
    """A folder that the library datasets wrote."""

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
    """Open a saved dataset by its own columns and splits; a single one is the training split.

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
    splits = read_json(stated, _Splits, _WAY_OUT).splits
    if not splits:
        raise RequestError(f"{printable(stated)} lists no splits; {_WAY_OUT}")
    for split in splits:
        _require_name(stated, split)
    return {split: root / split for split in splits}


def _open_split(split: str, folder: Path) -> "datasets.Dataset":
    """Open the files of a split where they are."""
    import datasets

    stated = folder / "state.json"
    state = read_json(stated, _State, _WAY_OUT)
    if state._indices_data_files:
        raise RequestError(
            f"{printable(stated)} lists rows selected by an old version of datasets, which newer ones ignore; load it "
            "with that version and save flatten_indices() of it"
        )
    info = read_json(folder / "dataset_info.json", dict[str, Any], _WAY_OUT)
    files = [folder / _require_name(stated, file.filename) for file in state._data_files]
    tables = [_open_file(file) for file in files]
    if not sum(table.num_rows for table in tables):
        raise RequestError(f"{printable(folder)}: no rows (split {printable(split)}); save the dataset without it")
    try:
        return datasets.Dataset(datasets.table.concat_tables(tables), info=datasets.DatasetInfo.from_dict(info))
    except DAMAGED as error:
        raise _unreadable(folder, one_line(error)) from error


def _open_file(path: Path) -> "datasets.table.Table":
    """Map an Arrow file to memory; what it says of itself is checked, as nothing checks it later."""
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
    """Return the name of a file or folder beside another, which no path to elsewhere is."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise RequestError(f"{printable(stated)} names {printable(name)}, which is no name of a file; {_WAY_OUT}")
    return name


def _unreadable(path: Path, reason: str) -> RequestError:
    return RequestError(f"{printable(path)} of a folder of datasets.save_to_disk cannot be read: {reason}; {_WAY_OUT}")
