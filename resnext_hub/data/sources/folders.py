"""Class folders, optionally inside split folders.

The layout is inferred from the names and nesting of folders; an ambiguous one raises RequestError.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from resnext_hub.data.sources.names import class_names_of, loose_role, split_role
from resnext_hub.data.sources.refusals import LAYOUTS, reject_no_images, reject_tables
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.texts import Files
from resnext_hub.data.sources.unread import reject_unread_tables
from resnext_hub.data.sources.walk import (
    IMAGE_SUFFIXES,
    Tree,
    describe_counts,
    ignored,
    stored_path,
    suffix_of,
)
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

_DOCUMENTS = frozenset(
    (
        ".cfg", ".csv", ".db", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".log", ".md", ".parquet", ".pdf",
        ".py", ".rst", ".sh", ".toml", ".tsv", ".txt", ".url", ".xlsx", ".xml", ".yaml", ".yml",
    )
)  # fmt: skip
"""Suffixes of files that are certainly not images; a folder with only these is not a class."""

IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "masks", "photos", "pics"})
"""Names of folders that contain images of all classes."""

_ROWS = 1 << 16
"""Rows of each chunk of a table of images."""


class ClassFolders:
    """A folder per class, optionally inside split folders."""

    def matches(self, request: "Request") -> bool:
        """Return True: this is the last layout to try."""
        return True

    def open(self, request: "Request") -> OpenDataset:
        """Open the class folders."""
        request.require_no_streaming()
        if not request.tree.images:
            reject_no_images(request.tree)
        return open_folders(request.tree, request.config.layout).with_notes(ignored(request.tree, []))


@dataclass(frozen=True)
class Folder:
    """A folder and the images anywhere below it, as indices of the tree's images."""

    path: str
    images: Sequence[int]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]


def open_folders(tree: Tree, layout: str | None) -> OpenDataset:
    """Open class folders, or split folders with class folders in them.

    Args:
        tree: The files of the dataset.
        layout: Whether the top folders are `classes` or `splits`; inferred from their names if not given.

    Raises:
        RequestError: If the layout is unknown or ambiguous, or a class would be lost.
    """
    import datasets

    notes: list[str] = []
    top = _unwrap(tree, notes)
    splits = _find_splits(tree, top, layout, notes)
    _reject_lost_classes(tree, [folder.path for folder, _ in splits.values()], notes)
    raw = sorted({name for _, classes in splits.values() for name in classes})
    names = class_names_of(raw, printable(tree.root))
    labels = sorted(set(names.values()))
    if len(labels) < 2:
        _reject_single_class(tree, raw[0] if raw else None, top)
    if layout is None:
        by_class = [classes for _, classes in splits.values()]
        found = "classes" if any(folder is top for folder, _ in splits.values()) else "splits"
        notes += reject_unread_tables(tree, by_class, found)
    number = {name: labels.index(label) for name, label in names.items()}
    tables = {}
    for split, (folder, classes) in splits.items():
        if not classes:
            raise RequestError(
                f"{printable(tree.root / folder.path)} has no images in class folders; expected one folder per class"
            )
        order = [(index, number[name]) for name, images in classes.items() for index in images]
        order.sort(key=lambda entry: (entry[1], entry[0]))
        tables[printable(split)] = image_table(
            tree, [index for index, _ in order], "label", [n for _, n in order], datasets.ClassLabel(names=labels)
        )
    used = (index for _, classes in splits.values() for images in classes.values() for index in images)
    return OpenDataset(
        tables=tables,
        files=Files(tree.images, tree.sizes, sorted(used)),
        roots=None,
        notes=tuple(notes),
    )


def image_table(
    tree: Tree, images: Sequence[int], label_column: str, labels: Sequence[object], feature: object
) -> "datasets.Dataset":
    """Return a table of image paths and labels."""
    import datasets
    import pyarrow

    image_column = "image" if label_column != "image" else "file_name"
    root = os.path.join(tree.root, "")
    features = datasets.Features({image_column: datasets.Image(decode=False), label_column: feature})
    label_type = features.arrow_schema.field(label_column).type
    values = labels if isinstance(labels, pyarrow.Array) else pyarrow.array(labels, label_type)
    digest = hashlib.sha256(repr(features).encode())
    _update(digest, values)
    parts = []
    for start in range(0, max(len(images), 1), _ROWS):  # so that few paths are Python strings at a time
        rows = slice(start, start + _ROWS)
        paths = pyarrow.array([stored_path(root + tree.images[i]) for i in images[rows]], pyarrow.string())
        _update(digest, paths)
        nothing = pyarrow.nulls(len(paths), pyarrow.binary())
        struct = pyarrow.StructArray.from_arrays([nothing, paths], ["bytes", "path"])
        parts.append(pyarrow.table({image_column: struct, label_column: values[rows]}))
    table = datasets.table.InMemoryTable(pyarrow.concat_tables(parts))
    # without a fingerprint, datasets would pickle the whole table to compute one
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=digest.hexdigest()[:16])


def _update(digest: "hashlib._Hash", column: Any) -> None:
    for buffer in column.buffers():
        if buffer is not None:
            digest.update(buffer)


def _below(tree: Tree, folder: Folder) -> tuple[dict[str, Folder], list[int]]:
    """Return the subfolders of a folder that contain images, and the images directly in it."""
    depth = folder.path.count("/") + 1 if folder.path else 0
    groups: dict[str, list[int]] = defaultdict(list)
    direct = []
    for index in folder.images:
        parts = tree.images[index].split("/", depth + 1)
        if len(parts) == depth + 1:
            direct.append(index)
        else:
            groups[parts[depth]].append(index)
    return {name: Folder(_join(folder.path, name), images) for name, images in groups.items()}, direct


def _unwrap(tree: Tree, notes: list[str]) -> Folder:
    """Return the folder of classes or splits inside wrapper folders, which archives and downloads often add."""
    top = Folder("", range(len(tree.images)))
    while True:
        inside, direct = _below(tree, top)
        if len(inside) == 1:
            (only,) = inside.values()
            deeper, flat = _below(tree, only)
            inner_roles = {split_role(name) for name in deeper}
            if deeper and not flat and (split_role(only.name) is None or inner_roles == {"train", "eval"}):
                top = only
                notes.append(f"using the only subfolder with images, {printable(only.path)}/")
                continue
        if inside and direct:
            notes.append(f"ignored {len(direct)} images outside class folders, such as {_example(tree, direct)}")
        return top


def _find_splits(
    tree: Tree, top: Folder, layout: str | None, notes: list[str]
) -> dict[str, tuple[Folder, dict[str, Sequence[int]]]]:
    """Return the folder of each split, and the images of its class folders."""
    inside, _ = _below(tree, top)
    names = list(inside) if layout == "splits" else [] if layout == "classes" else _split_names(tree, inside, notes)
    if not names:
        if layout is None and any(name.lower() in IMAGE_FOLDERS for name in inside):
            reject_tables(tree, top.path)
        return {"train": (top, {name: folder.images for name, folder in inside.items()})}
    others = [name for name in _folders_in(tree, top) if name not in names]
    if others:
        notes.append(
            f"splits: {listing(names)}; ignored folders: {listing(others)} (--layout splits uses every folder as a "
            "split, --layout classes as a class)"
        )
    found = {}
    for name, (folder, classes, direct) in _classes_by_split(tree, {name: inside[name] for name in names}).items():
        if not classes:
            raise RequestError(
                f"the split {printable(folder.path)} has {len(direct)} images and no class folders; sort them into one "
                "folder per class, or add a metadata.csv (columns file_name,label)"
            )
        if direct:
            notes.append(
                f"ignored {len(direct)} images of {printable(folder.path)}/ outside class folders, such as "
                f"{_example(tree, direct)}"
            )
        found[name] = (folder, {label: inner.images for label, inner in classes.items()})
    return found


def _classes_by_split(
    tree: Tree, splits: Mapping[str, Folder]
) -> dict[str, tuple[Folder, dict[str, Folder], list[int]]]:
    """Return the folder, the class folders and the loose images of each split.

    The only folder of a split is a wrapper if it has the split's name (`seg_train/seg_train/CLASS`), or if every split
    has only this one (`train/images/CLASS`).
    """
    found = {name: (folder, *_below(tree, folder)) for name, folder in splits.items()}
    alone = {name: next(iter(classes.values())) for name, (_, classes, _) in found.items() if len(classes) == 1}
    everywhere = len(alone) == len(found) and len({folder.name for folder in alone.values()}) == 1
    for name, inner in alone.items():
        classes, direct = _below(tree, inner)
        if classes and not direct and (everywhere or inner.name.lower() == name.lower()):
            found[name] = (inner, classes, direct)
    return found


def _split_names(tree: Tree, inside: Mapping[str, Folder], notes: list[str]) -> list[str]:
    """Return the folders that are splits, or none if all are classes.

    Raises:
        RequestError: If that is ambiguous.
    """
    named = {name: folder for name, folder in inside.items() if split_role(name) or loose_role(name)}
    nested = [name for name, folder in named.items() if not _below(tree, folder)[1]]
    exact = [name for name in inside if split_role(name)]
    splits = [name for name in nested if split_role(name)]
    roles = {split_role(name) for name in splits}
    if splits and len(roles) == 1:  # such as train/ beside test_set/
        splits += [name for name in nested if name not in exact and loose_role(name) not in (None, *roles)]
        roles = {loose_role(name) for name in splits}
    others = [name for name in inside if name not in exact and name not in splits]
    if roles == {"train", "eval"} or (roles == {"train"} and not others):
        return splits
    if not others and roles and len(splits) == len(exact):
        return splits
    if splits or len({split_role(name) for name in exact}) == 2:
        _reject_ambiguous(tree, exact, splits)
    if exact and len(named) == len(inside) and len({loose_role(name) for name in named}) == 2:  # train/ beside test1/
        _reject_ambiguous(tree, list(named), splits)
    if exact and len(inside) > 1:
        notes.append(f"treating {listing(exact)} as a class, like the folders beside it (override with --layout)")
    if exact:
        return []
    loose = {name: inside[name] for name in inside if loose_role(name)}
    if {loose_role(name) for name in loose} == {"train", "eval"}:
        within = [name for name in loose if name in nested]
        classes = [
            set(found) for _, found, _ in _classes_by_split(tree, {name: loose[name] for name in within}).values()
        ]
        if {loose_role(name) for name in within} == {"train", "eval"} and set.intersection(*classes):
            return within
        if len(loose) == len(inside):
            _reject_ambiguous(tree, list(loose), within)
    _check_shared_folders(tree, inside, notes)
    return []


def _check_shared_folders(tree: Tree, inside: Mapping[str, Folder], notes: list[str]) -> None:
    """Raise RequestError for splits inside class folders; note subfolders that all classes share."""
    below = {name: set(_below(tree, folder)[0]) for name, folder in inside.items()}
    shared = sorted(set.intersection(*below.values())) if len(below) > 1 else []
    if {split_role(name) for name in shared} >= {"train", "eval"}:
        raise RequestError(
            f"{printable(tree.root)} has splits ({listing(shared)}) inside each of {listing(inside)}; move the classes "
            f"into the splits, such as train/cat, or use {setting('layout', 'classes')} to merge the splits"
        )
    holders = [name for name, inner in below.items() if {split_role(folder) for folder in inner} >= {"train", "eval"}]
    if holders:
        holder = inside[holders[0]]
        raise RequestError(
            f"{printable(tree.root)} has splits ({listing(sorted(below[holders[0]]), 4)}) in {printable(holders[0])}, "
            f"and other folders beside it; use {setting('dataset', tree.root / holder.path)}, or "
            f"{setting('layout', 'classes')} if all folders are classes"
        )
    if len(shared) > 1:
        notes.append(
            f"using {listing(inside)} as classes, each with the subfolders {listing(shared)}; if the latter are the "
            "classes, add --layout splits"
        )


def _reject_ambiguous(tree: Tree, names: Sequence[str], splits: Sequence[str]) -> NoReturn:
    flat = [name for name in names if name not in splits]
    why = f"but no class folders in {listing(flat)}" if flat else "and other folders beside them"
    raise RequestError(
        f"{printable(tree.root)} has folders named like splits ({listing(names)}), {why}; if all folders are "
        f"classes, use {setting('layout', 'classes')}; if they are splits, add class folders or a metadata.csv "
        "(columns file_name,label) to each, and move the other folders elsewhere"
    )


def _reject_lost_classes(tree: Tree, places: Iterable[str], notes: list[str]) -> None:
    """Note class folders without images; raise RequestError if their files could be images of an unknown format."""
    empty = []
    for place in places:
        start = f"{place}/" if place else ""
        filled = {path[len(start) :].partition("/")[0] for path in tree.images if path.startswith(start)}
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for path in tree.others:
            name, inner, _ = path[len(start) :].partition("/")
            if path.startswith(start) and inner and name not in filled:
                kinds[name][suffix_of(path)] += 1
        for name, counts in kinds.items():
            if set(counts) - _DOCUMENTS:
                raise RequestError(
                    f"the class folder {printable(start + name)} has no images with a known suffix (found "
                    f"{describe_counts(counts)}); convert them to one of {' '.join(IMAGE_SUFFIXES)}, or move the "
                    "folder elsewhere"
                )
        empty += [start + name for name in _folders_in(tree, Folder(place, ())) if name not in filled]
    if empty:
        notes.append(f"ignored folders without images: {listing(sorted(empty))}")


def _reject_single_class(tree: Tree, name: str | None, top: Folder) -> NoReturn:
    reject_tables(tree, top.path)
    found = describe_counts(Counter(suffix_of(path) for path in tree.images))
    if name is None:
        raise RequestError(f"{printable(tree.root)} has images ({found}) but no class folders; expected {LAYOUTS}")
    raise RequestError(
        f"{printable(tree.root)} has a single class, {printable(name)} ({found}), but a classifier needs at least "
        f"two; expected {LAYOUTS}"
    )


def _folders_in(tree: Tree, folder: Folder) -> list[str]:
    """Return the names of all subfolders of a folder, including those without images."""
    start = f"{folder.path}/" if folder.path else ""
    inner = (path[len(start) :] for path in tree.folders if path.startswith(start))
    return sorted(name for name in inner if name and "/" not in name)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _example(tree: Tree, images: Sequence[int]) -> str:
    return printable(tree.images[images[0]])
