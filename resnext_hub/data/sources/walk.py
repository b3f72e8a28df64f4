"""List the files under a folder in a fixed order: images, other files, and what is ignored."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from resnext_hub.errors import RequestError
from resnext_hub.text import listing, printable

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".7z", ".rar")
"""Suffixes of archives, including those that cannot be unpacked."""

_JUNK = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "__pycache__"})
"""Folders created by archivers, operating systems and network storage, in lower case."""

_RUN_MARKS = frozenset({"metrics.jsonl", "record.json", "checkpoints"})
"""Files that identify a run folder, together with `config.yaml`; its plots are not images of a dataset."""

_NEVER_ENTERED = ("/proc", "/sys", "/dev")
"""Virtual file systems that a link could lead to."""


@dataclass(kw_only=True)
class Tree:
    """The content of a folder; paths are relative to it, with slashes."""

    root: Path
    images: list[str] = field(default_factory=list)
    """Files with the suffix of an image, sorted by the parts of their paths, including dangling links."""
    sizes: MutableSequence[int] = field(default_factory=lambda: array("q"))
    """Size in bytes of each image; -1 for a dangling link."""
    others: list[str] = field(default_factory=list)
    """All other files that are not hidden."""
    folders: list[str] = field(default_factory=list)
    """All folders that were entered, except the root."""
    hidden: int = 0
    """Number of hidden files."""
    junk: list[str] = field(default_factory=list)
    """Folders that are hidden or created by other programs."""
    runs: list[str] = field(default_factory=list)
    """Run folders of this package."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders that were found elsewhere, or that contain the dataset itself."""
    dangling: list[str] = field(default_factory=list)
    """Dangling links without the suffix of an image."""

    @cached_property
    def image_folders(self) -> set[str]:
        """The folders that images are in."""
        return {path.rpartition("/")[0] for path in self.images}


def walk(root: Path) -> Tree:
    """List the files under a folder.

    Every real folder is entered once. Links are followed after all other folders, but not to a folder that was already
    found or to a parent. No file is opened.

    Raises:
        RequestError: If a folder cannot be read, or the root is the root of the file system.
    """
    tree = Tree(root=root)
    top = Path(os.path.realpath(root))
    if top == top.parent:
        raise RequestError(f"{printable(root)} is the root of the file system; expected a folder of images")
    above = [*map(str, top.parents), *_NEVER_ENTERED]
    seen = {_identity(folder) for folder in above if os.path.isdir(folder)}
    found = list[str]()
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
        place = folders.pop() if folders else links.pop()
        try:
            identity = _identity(os.path.join(root, place))
            if identity in seen:
                tree.repeated.append(place)
                continue
            seen.add(identity)
            _scan(tree, place, found, folders, links)
        except OSError as error:
            where = f"the folder {printable(place)} in {printable(root)}" if place else printable(root)
            reason = (error.strerror or type(error).__name__).lower()
            raise RequestError(
                f"{where} cannot be read: {reason}; fix its permissions, or move it out of the dataset"
            ) from error
    tree.images, tree.sizes = sorted_images(found)
    tree.others.sort()
    return tree


def image_entry(path: str, size: int) -> str:
    """Return the path and size of an image as one string for `sorted_images`, which takes less memory than a pair."""
    sortable = path.replace("/", "\0")  # no name contains it, and it sorts before all characters, as parts do
    return f"{sortable}\0\0{size}"


def sorted_images(entries: list[str]) -> tuple[list[str], MutableSequence[int]]:
    """Sort entries from `image_entry` in place by the parts of their paths; return the paths, and the size of each."""
    entries.sort()
    sizes = array("q")
    for i, entry in enumerate(entries):
        path, _, size = entry.partition("\0\0")
        entries[i] = path.replace("\0", "/")
        sizes.append(int(size))
    return entries, sizes


def list_images(folder: Path) -> list[Path]:
    """Return the files with the suffix of an image anywhere under a folder, sorted by path.

    Raises:
        RequestError: If a folder cannot be read.
    """
    return [folder / path for path in walk(folder).images]


def _scan(tree: Tree, place: str, found: list[str], folders: list[str], links: list[str]) -> None:
    folder = os.path.join(tree.root, place)
    if place:
        with os.scandir(folder) as entries:
            if is_run_folder(entry.name for entry in entries):
                tree.runs.append(place)
                return
        tree.folders.append(place)
    with os.scandir(folder) as entries:  # once more, because the entries of a large folder take much memory
        for entry in entries:
            path = f"{place}/{entry.name}" if place else entry.name
            is_link = entry.is_symlink()
            if _is_folder(entry):
                if is_hidden(entry.name):
                    tree.junk.append(path)
                else:
                    (links if is_link else folders).append(path)
            elif is_hidden(entry.name):
                tree.hidden += 1
            elif is_image(entry.name):
                found.append(image_entry(path, _size(entry, is_link)))
            elif is_link and not os.path.exists(entry.path):
                tree.dangling.append(path)
            else:
                tree.others.append(path)


def is_run_folder(names: Iterable[str]) -> bool:
    """Return whether a folder with these entries is a run folder."""
    marks = {name for name in names if name == "config.yaml" or name in _RUN_MARKS}
    return "config.yaml" in marks and len(marks) > 1


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was created by another program."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def skipped(tree: Tree, used: Iterable[str] = ()) -> str | None:
    """Return a line about files that are not images, or None if there are none.

    Args:
        tree: The files of the dataset.
        used: Other files that are used, such as tables.
    """
    kinds = Counter(suffix_of(path) for path in set(tree.others).difference(used))
    if tree.hidden:
        kinds["hidden"] = tree.hidden
    if not kinds:
        return None
    total = sum(kinds.values())
    return f"{total} {'file' if total == 1 else 'files'} skipped ({describe_counts(kinds)})"


def ignored(tree: Tree, used: Iterable[str], more: Iterable[str] = ()) -> list[str]:
    """Return log lines about files and folders that are not part of the dataset.

    Args:
        tree: The files of the dataset.
        used: Files other than images that are used.
        more: Descriptions of more ignored files.
    """
    used, found = list(used), list(more)
    for what, places in (
        ("", tree.junk),
        ("run folder ", tree.runs),
        ("link to a folder found elsewhere ", tree.repeated),
        ("dangling link ", tree.dangling),
    ):
        found += [f"{what}{printable(place)}" for place in sorted(places)[:4]]
        found += [f"{len(places) - 4} more of these"] if len(places) > 4 else []
    notes = [f"ignored: {', '.join(found)}"] if found else []
    stray = [path for path in tree.others if path.lower().endswith(".parquet") and path not in used]
    if stray:
        notes.append(f"ignored parquet files without images: {listing(stray, 4)}")
    files = skipped(tree, [*used, *stray])
    return [*notes, files] if files else notes


def suffix_of(path: str) -> str:
    """Return the suffix of a file in lower case, or `no suffix`."""
    return printable(os.path.splitext(path)[1].lower()) or "no suffix"


def describe_counts(counts: Counter[str]) -> str:
    """Return counts as text, the most frequent first, such as `.heic: 20, hidden: 3`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(f"{name}: {count}" for name, count in ordered[:8]) + more


def stored_path(path: str) -> str:
    """Return a path as valid UTF-8 text; `real_path` is the inverse.

    A byte that is not UTF-8 becomes a NUL, which paths cannot contain, and two hexadecimal digits.
    """
    if path.isascii():
        return path
    return "".join(f"\0{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in path)


def real_path(stored: str) -> str:
    """Return the path that `stored_path` encoded."""
    if "\0" not in stored:
        return stored
    return re.sub("\0([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), stored)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into an unreadable folder
        return False


def _size(entry: os.DirEntry[str], is_link: bool) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return -1
    except OSError:
        if is_link:
            return -1
        raise
