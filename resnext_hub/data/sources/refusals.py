"""Errors for folders that have none of the supported layouts."""

import os
from collections import Counter
from typing import NoReturn

from resnext_hub.data.sources.names import loose_role
from resnext_hub.data.sources.walk import ARCHIVES, IMAGE_SUFFIXES, Tree, describe_counts, suffix_of
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable

LAYOUTS = (
    "one of these layouts: one folder per class, such as cat/ and dog/; train/ and val/ with class folders in each; "
    "images with a table of file names and labels, such as labels.csv; parquet files; WebDataset shards; IDX files, "
    "such as MNIST's; or a zip or tar file that contains one of these"
)
"""The supported layouts of a local folder, for messages."""

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".xlsx")


def reject_linked_splits(tree: Tree) -> None:
    """Raise RequestError for links that would fill a split with a folder that is already part of the dataset.

    Each folder is read only once, at its own path, so such a split would be empty. Links within a split to a folder of
    that split, or to one of their parents, add nothing and are ignored.
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
                f"{printable(tree.root / path)} is a link to {printable(target.rstrip('/'))}, which is already part of "
                "the dataset; move that folder out of the dataset, replace the link with images, or ignore it with "
                f"{setting('layout', 'classes')}"
            )


def reject_tables(tree: Tree, folder: str) -> None:
    """Raise RequestError if images without class folders have a table beside them that is not used.

    Args:
        tree: The files of the dataset.
        folder: The folder of the images, relative to the root.
    """
    start = f"{folder}/" if folder else ""
    tables = [path for path in tree.others if path.startswith(start) and path.lower().endswith(TABLE_SUFFIXES)]
    if tables:
        raise RequestError(
            f"{printable(tree.root)} has no class folders, and its table {printable(tables[0])} does not list its "
            "images; expected a CSV, TSV, JSON lines or parquet file with a column of file names (relative to the "
            "table) and one of labels, or one folder per class"
        )


def reject_no_images(tree: Tree) -> NoReturn:
    """Raise RequestError for a folder without images, with what it contains instead."""
    where = printable(tree.root)
    packed = [path for path in tree.others if path.lower().endswith(ARCHIVES)]
    if packed:
        raise RequestError(
            f"{where} contains no images, only archives ({listing(packed, 3)}); choose one, such as "
            f"{setting('dataset', tree.root / packed[0])}, or unpack them"
        )
    found = describe_counts(Counter(suffix_of(path) for path in tree.others)) or "nothing"
    raise RequestError(
        f"{where} has no images (found: {found}; known suffixes: {' '.join(IMAGE_SUFFIXES)}); expected {LAYOUTS}"
    )
