"""Folders that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

import os
from pathlib import Path

from resnext_hub.data.sources.parquet import DAMAGED
from resnext_hub.data.sources.source import Source
from resnext_hub.data.sources.walk import Tree
from resnext_hub.errors import RequestError, one_line
from resnext_hub.text import printable


def is_saved(root: Path) -> bool:
    """Return whether a folder was written by save_to_disk."""
    return (root / "dataset_dict.json").is_file() or all(
        (root / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def open_saved(tree: Tree) -> Source:
    """Open a saved dataset by its own columns and splits; a single one is the training split.

    Raises:
        RequestError: If it cannot be read.
    """
    import datasets

    root = tree.root
    try:
        found = datasets.load_from_disk(str(root))
    except (OSError, *DAMAGED) as error:
        raise RequestError(
            f"{printable(root)} is a folder of datasets.save_to_disk that cannot be read: {one_line(error)}"
        ) from error
    tables = {str(name): table for name, table in found.items()} if isinstance(found, dict) else {"train": found}
    return Source(
        tables={name: table if table._indices is None else table.flatten_indices() for name, table in tables.items()},
        files=tuple((path, os.stat(root / path).st_size) for path in tree.others),
        roots=(os.path.realpath(root),),
        notes=(f"{printable(root.name)} was written by datasets.save_to_disk",),
    )
