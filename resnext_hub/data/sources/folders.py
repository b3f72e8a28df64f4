"""Folders of class folders, with or without folders of splits around them.

The layout is read from the names and the nesting of folders. Where that could mean two things, it is refused.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from resnext_hub.data.sources.names import class_names_of, loose_role, split_role
from resnext_hub.data.sources.refusals import LAYOUTS, refuse_no_images, refuse_tables
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.unread import refuse_unread_tables
from resnext_hub.data.sources.walk import (
    IMAGE_SUFFIXES,
    Tree,
    describe_counts,
    ignored,
    stored_path,
    suffix_of,
)
from resnext_hub.errors import RequestError
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
"""Suffixes of files that are surely no images: a folder of these alone is no class."""

_HOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "masks", "photos", "pics"})
"""Names of folders that hold all images, whatever their class."""


class ClassFolders:
    """A folder per class, with or without folders of splits around them."""

    def matches(self, request: "Request") -> bool:
        """Return True: this is the layout of a folder that has no other."""
        return True

    def open(self, request: "Request") -> OpenDataset:
        """Open the class folders."""
        request.require_no_streaming()
        if not request.tree.images:
            refuse_no_images(request.tree)
        return open_folders(request.tree, request.config.layout).with_notes(ignored(request.tree, []))


@dataclass(frozen=True)
class Folder:
    """A folder and all images below it, as indices of the tree's."""

    path: str
    images: Sequence[int]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]


def open_folders(tree: Tree, layout: str | None) -> OpenDataset:
    """Open a folder of class folders, or of splits that hold class folders.

    Args:
        tree: Its files.
        layout: `classes` or `splits`, what the folders at the top are; found by their names if not given.

    Raises:
        RequestError: If the layout is none of the known ones or could be two, or a class would vanish.
    """
    import datasets

    notes: list[str] = []
    top = _entered(tree, notes)
    splits = _find_splits(tree, top, layout, notes)
    _refuse_lost_classes(tree, [folder.path for folder, _ in splits.values()], notes)
    raw = sorted({name for _, classes in splits.values() for name in classes})
    names = class_names_of(raw, printable(tree.root))
    labels = sorted(set(names.values()))
    if len(labels) < 2:
        _refuse_single_class(tree, raw[0] if raw else None, top)
    if layout is None:
        by_class = [classes for _, classes in splits.values()]
        found = "classes" if any(folder is top for folder, _ in splits.values()) else "splits"
        notes += refuse_unread_tables(tree, by_class, found)
    number = {name: labels.index(label) for name, label in names.items()}
    tables = {}
    for split, (folder, classes) in splits.items():
        if not classes:
            raise RequestError(
                f"{printable(tree.root / folder.path)} holds no images in class folders; expected a folder per class"
            )
        order = [(index, number[name]) for name, images in classes.items() for index in images]
        order.sort(key=lambda entry: (entry[1], entry[0]))
        tables[printable(split)] = image_table(
            tree, [index for index, _ in order], "label", [n for _, n in order], datasets.ClassLabel(names=labels)
        )
    used = (index for _, classes in splits.values() for images in classes.values() for index in images)
    return OpenDataset(
        tables=tables,
        files=tuple((tree.images[i], tree.sizes[i]) for i in sorted(used)),
        roots=None,
        notes=tuple(notes),
    )


def image_table(
    tree: Tree, images: Sequence[int], label_column: str, labels: Sequence[object], feature: object
) -> "datasets.Dataset":
    """Return a table of undecoded images, as paths, beside their labels."""
    import datasets
    import pyarrow

    image_column = "image" if label_column != "image" else "file_name"
    root = os.path.join(tree.root, "")
    paths = [stored_path(root + tree.images[i]) for i in images]
    struct = pyarrow.StructArray.from_arrays(
        [pyarrow.nulls(len(paths), pyarrow.binary()), pyarrow.array(paths, pyarrow.string())], ["bytes", "path"]
    )
    features = datasets.Features({image_column: datasets.Image(decode=False), label_column: feature})
    columns = {
        image_column: struct,
        label_column: pyarrow.array(labels, features.arrow_schema.field(label_column).type),
    }
    table = datasets.table.InMemoryTable(pyarrow.table(columns))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _below(tree: Tree, folder: Folder) -> tuple[dict[str, Folder], list[int]]:
    """Return the folders directly in a folder that hold images, and the images directly in it."""
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


def _entered(tree: Tree, notes: list[str]) -> Folder:
    """Enter folders that are alone in theirs and hold nothing but folders, as archives and downloads have them."""
    top = Folder("", range(len(tree.images)))
    while True:
        inside, direct = _below(tree, top)
        if len(inside) == 1:
            (only,) = inside.values()
            deeper, flat = _below(tree, only)
            inner_roles = {split_role(name) for name in deeper}
            if deeper and not flat and (split_role(only.name) is None or inner_roles == {"train", "eval"}):
                top = only
                notes.append(f"{printable(only.path)}/ was entered, as it alone holds the class folders")
                continue
        if inside and direct:
            notes.append(f"{len(direct)} images outside class folders left out, such as {_example(tree, direct)}")
        return top


def _find_splits(
    tree: Tree, top: Folder, layout: str | None, notes: list[str]
) -> dict[str, tuple[Folder, dict[str, Sequence[int]]]]:
    """Return each split's folder, and the images of each of its class folders."""
    inside, _ = _below(tree, top)
    names = list(inside) if layout == "splits" else [] if layout == "classes" else _split_names(tree, inside, notes)
    if not names:
        if layout is None and any(name.lower() in _HOLDERS for name in inside):
            refuse_tables(tree, top.path)
        return {"train": (top, {name: folder.images for name, folder in inside.items()})}
    left_out = [name for name in _folders_in(tree, top) if name not in names]
    if left_out:
        notes.append(
            f"splits {listing(names)}; left out: {listing(left_out)} (--layout splits takes every folder as a split, "
            "--layout classes as a class)"
        )
    found = {}
    for name, (folder, classes, direct) in _classes_by_split(tree, {name: inside[name] for name in names}).items():
        if not classes:
            raise RequestError(
                f"the split {printable(folder.path)} holds {len(direct)} images and no class folders; labels come from "
                "class folders, or from a metadata.csv in it (columns file_name,label)"
            )
        if direct:
            notes.append(
                f"{len(direct)} images of {printable(folder.path)}/ outside class folders left out, such as "
                f"{_example(tree, direct)}"
            )
        found[name] = (folder, {label: inner.images for label, inner in classes.items()})
    return found


def _classes_by_split(
    tree: Tree, splits: Mapping[str, Folder]
) -> dict[str, tuple[Folder, dict[str, Folder], list[int]]]:
    """Return the folder, the class folders and the loose images of each split.

    A folder that stands alone in its split is entered if it has the split's name (`seg_train/seg_train/CLASS`), or if
    it stands alone in every split (`train/images/CLASS`).
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
        RequestError: If they could be either.
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
        _refuse_ambiguous(tree, exact, splits)
    if exact and len(named) == len(inside) and len({loose_role(name) for name in named}) == 2:  # train/ beside test1/
        _refuse_ambiguous(tree, list(named), splits)
    if exact and len(inside) > 1:
        notes.append(f"{listing(exact)} is taken for a class, as the folders beside it are (--layout says otherwise)")
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
            _refuse_ambiguous(tree, list(loose), within)
    _doubt_shared_folders(tree, inside, notes)
    return []


def _doubt_shared_folders(tree: Tree, inside: Mapping[str, Folder], notes: list[str]) -> None:
    """Refuse splits within class folders, and name folders that all classes have, which could be the classes."""
    below = {name: set(_below(tree, folder)[0]) for name, folder in inside.items()}
    shared = sorted(set.intersection(*below.values())) if len(below) > 1 else []
    if {split_role(name) for name in shared} >= {"train", "eval"}:
        raise RequestError(
            f"{printable(tree.root)} has splits ({listing(shared)}) in each of {listing(inside)}; expected the classes "
            "within the splits, such as train/cat; --layout classes takes all images of a class together"
        )
    holders = [name for name, inner in below.items() if {split_role(folder) for folder in inner} >= {"train", "eval"}]
    if holders:
        holder = inside[holders[0]]
        raise RequestError(
            f"{printable(tree.root)} has splits ({listing(sorted(below[holders[0]]), 4)}) in its folder "
            f"{printable(holders[0])} and more beside them; give {printable(tree.root / holder.path)} as --dataset, or "
            "add --layout classes"
        )
    if len(shared) > 1:
        notes.append(
            f"classes are {listing(inside)}, each with folders {listing(shared)} in it; if those are the classes, add "
            "--layout splits"
        )


def _refuse_ambiguous(tree: Tree, names: Sequence[str], splits: Sequence[str]) -> NoReturn:
    flat = [name for name in names if name not in splits]
    what = f"{listing(flat)} holding images and no class folders" if flat else f"other folders beside {listing(splits)}"
    raise RequestError(
        f"{printable(tree.root)} has folders called like splits ({listing(names)}), with {what}: if all folders are "
        "classes, add --layout classes; if they are splits, each needs class folders or a metadata.csv (columns "
        "file_name,label), and other folders have to go"
    )


def _refuse_lost_classes(tree: Tree, places: Iterable[str], notes: list[str]) -> None:
    """Name class folders without an image; refuse where their files could be images of an unknown kind."""
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
                    f"the class folder {printable(start + name)} holds no images of a known kind "
                    f"({describe_counts(counts)}); convert them, or move the folder away; known suffixes: "
                    f"{' '.join(IMAGE_SUFFIXES)}"
                )
        empty += [start + name for name in _folders_in(tree, Folder(place, ())) if name not in filled]
    if empty:
        notes.append(f"folders without images left out: {listing(sorted(empty))}")


def _refuse_single_class(tree: Tree, name: str | None, top: Folder) -> NoReturn:
    refuse_tables(tree, top.path)
    found = describe_counts(Counter(suffix_of(path) for path in tree.images))
    if name is None:
        raise RequestError(f"{printable(tree.root)} holds images ({found}) and no class folders; expected {LAYOUTS}")
    raise RequestError(
        f"{printable(tree.root)} has a single class to train on ({printable(name)}), with images {found}; a classifier "
        f"needs at least two: {LAYOUTS}"
    )


def _folders_in(tree: Tree, folder: Folder) -> list[str]:
    """Return the names of all folders directly in one, those without images too."""
    start = f"{folder.path}/" if folder.path else ""
    inner = (path[len(start) :] for path in tree.folders if path.startswith(start))
    return sorted(name for name in inner if name and "/" not in name)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _example(tree: Tree, images: Sequence[int]) -> str:
    return printable(tree.images[images[0]])
