"""Folders that are refused whatever their layout, with the layouts that work."""

import os
from collections import Counter
from typing import NoReturn

from resnext_hub.data.sources.names import loose_role
from resnext_hub.data.sources.walk import ARCHIVES, IMAGE_SUFFIXES, Tree, describe_counts, suffix_of
from resnext_hub.errors import RequestError
from resnext_hub.text import listing, printable

LAYOUTS = (
    "one folder per class, such as cat/ and dog/; train/ and val/ with class folders in each; images with a "
    "metadata.csv (columns file_name,label); or parquet files"
)
"""The layouts of a local folder, for messages."""

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".xlsx")


def refuse_linked_splits(tree: Tree) -> None:
    """Refuse links that would fill a split with a folder that is part of the dataset already.

    Each folder is read once, in its own place: such a split would vanish, or its images would be found elsewhere.
    Links within a split that lead to a folder of that split, or to one above them, add nothing and are ignored.

    Raises:
        RequestError: If there is such a link.
    """
    for path in tree.repeated:
        parts = path.split("/")
        depth = next((i for i, part in enumerate(parts, start=1) if loose_role(part)), 0)
        split, place, target = (
            os.path.join(os.path.realpath(tree.root / inner), "")
            for inner in ("/".join(parts[:depth]), "/".join(parts[:-1]), path)
        )
        within = depth < len(parts) and (target.startswith(split) or place.startswith(target))
        if depth and not within:
            raise RequestError(
                f"{printable(tree.root / path)} is a link to a folder that is part of the dataset already "
                f"({printable(target.rstrip('/'))}); a split needs images of its own: move that folder out of the "
                "dataset, or replace the link by images; --layout classes ignores the link"
            )


def refuse_tables(tree: Tree, folder: str) -> None:
    """Refuse images whose labels are in a table that is not read.

    Args:
        tree: The files.
        folder: The folder of the images, relative to the root.
    """
    start = f"{folder}/" if folder else ""
    tables = [path for path in tree.others if path.startswith(start) and path.lower().endswith(TABLE_SUFFIXES)]
    metadata = [path for path in tables if path.rpartition("/")[2].lower().startswith("metadata.")]
    if metadata:
        raise RequestError(
            f"{printable(tree.root / metadata[0])} has no column file_name; expected the columns file_name (as seen "
            "from the table) and label"
        )
    if tables:
        raise RequestError(
            f"{printable(tree.root)} has its labels in a table, {printable(tables[0])}: name it metadata.csv, with the "
            "columns file_name (as seen from the table) and label, or sort the images into one folder per class"
        )


def refuse_no_images(tree: Tree) -> NoReturn:
    """Name what a folder without a single image holds instead."""
    where = printable(tree.root)
    packed = [path for path in tree.others if path.lower().endswith(ARCHIVES)]
    if packed:
        raise RequestError(
            f"{where} holds archives ({listing(packed, 3)}) and no images; unpack them and give the folder (tar shards "
            "of WebDataset are not read yet)"
        )
    found = describe_counts(Counter(suffix_of(path) for path in tree.others)) or "nothing"
    raise RequestError(
        f"{where} holds no images (found: {found}); known suffixes: {' '.join(IMAGE_SUFFIXES)}; expected {LAYOUTS}"
    )
