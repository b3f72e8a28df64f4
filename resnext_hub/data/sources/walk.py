"""The files under a folder: which are images, in a fixed order, and what is left out."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from resnext_hub.errors import RequestError
from resnext_hub.text import listing, printable

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")

_JUNK = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "__pycache__"})
"""Folders that archives, operating systems and network disks leave behind, in lower case."""

_RUN_MARKS = frozenset({"metrics.jsonl", "record.json", "checkpoints"})
"""What a run folder holds beside `config.yaml`; its plots are not images of a dataset."""

_NEVER_ENTERED = ("/proc", "/sys", "/dev")
"""Where a link could lead into what the kernel makes up."""


@dataclass(kw_only=True)
class Tree:
    """What was found under a folder; paths are relative to it, with slashes."""

    root: Path
    images: list[str] = field(default_factory=list)
    """Files with the suffix of an image, in the order of their paths' parts; links that lead nowhere are among them."""
    sizes: list[int] = field(default_factory=list)
    """Size in bytes of each image; -1 where there is nothing behind a link."""
    others: list[str] = field(default_factory=list)
    """All other files that are not hidden."""
    folders: list[str] = field(default_factory=list)
    """All folders that were entered, but the root."""
    hidden: int = 0
    """Number of hidden files."""
    junk: list[str] = field(default_factory=list)
    """Folders that are hidden or left behind by a program."""
    runs: list[str] = field(default_factory=list)
    """Run folders of this package."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders that were found elsewhere, or that hold the dataset itself."""
    broken: list[str] = field(default_factory=list)
    """Links that lead nowhere and are not called like an image."""


def walk(root: Path) -> Tree:
    """List the files under a folder.

    Every real folder is entered once: links are followed after all folders that are no links, and never to where
    something was found already or to a folder above. Nothing is opened.

    Raises:
        RequestError: If a folder cannot be read, or the root is that of the whole file system.
    """
    tree = Tree(root=root)
    top = Path(os.path.realpath(root))
    if top == top.parent:
        raise RequestError(f"{printable(root)} is the root of the file system; expected a folder of images")
    above = [*map(str, top.parents), *_NEVER_ENTERED]
    seen = {_identity(folder) for folder in above if os.path.isdir(folder)}
    found: list[tuple[str, int]] = []
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
            raise RequestError(f"{where} cannot be read: {reason}; make it readable, or move it away") from error
    found.sort(key=lambda entry: entry[0].split("/"))
    tree.images = [path for path, _ in found]
    tree.sizes = [size for _, size in found]
    tree.others.sort()
    return tree


def list_images(folder: Path) -> list[Path]:
    """Return the images anywhere under a folder, known by their suffixes, in the order of their paths.

    Raises:
        RequestError: If a folder cannot be read.
    """
    return [folder / path for path in walk(folder).images]


def _scan(tree: Tree, place: str, found: list[tuple[str, int]], folders: list[str], links: list[str]) -> None:
    with os.scandir(os.path.join(tree.root, place)) as entries:
        inside = list(entries)
    if place and is_run_folder({entry.name for entry in inside}):
        tree.runs.append(place)
        return
    if place:
        tree.folders.append(place)
    for entry in inside:
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
            found.append((path, _size(entry, is_link)))
        elif is_link and not os.path.exists(entry.path):
            tree.broken.append(path)
        else:
            tree.others.append(path)


def is_run_folder(names: Iterable[str]) -> bool:
    """Return whether these are the names of what a run folder holds."""
    names = set(names)
    return "config.yaml" in names and bool(_RUN_MARKS & names)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left behind by a program."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def skipped(tree: Tree, used: Iterable[str] = ()) -> str | None:
    """Describe in a line which files are not read as images, or return None.

    Args:
        tree: The files.
        used: Other files that were read.
    """
    kinds = Counter(suffix_of(path) for path in set(tree.others).difference(used))
    if tree.hidden:
        kinds["hidden"] = tree.hidden
    if not kinds:
        return None
    total = sum(kinds.values())
    return f"{total} {'file' if total == 1 else 'files'} skipped ({describe_counts(kinds)})"


def ignored(tree: Tree, used: Iterable[str], left_out: Iterable[str] = ()) -> list[str]:
    """Return log lines about what is not part of the dataset.

    Args:
        tree: The files.
        used: Files that were read beside the images.
        left_out: More to name.
    """
    used, left_out = list(used), list(left_out)
    for what, places in (
        ("", tree.junk),
        ("run folder ", tree.runs),
        ("link to a folder found elsewhere ", tree.repeated),
        ("link that leads nowhere ", tree.broken),
    ):
        left_out += [f"{what}{printable(place)}" for place in sorted(places)[:4]]
        left_out += [f"{len(places) - 4} more such folders"] if len(places) > 4 else []
    notes = [f"ignored: {', '.join(left_out)}"] if left_out else []
    stray = [path for path in tree.others if path.lower().endswith(".parquet") and path not in used]
    if stray:
        notes.append(f"ignored, as it holds no images: {listing(stray, 4)}")
    files = skipped(tree, [*used, *stray])
    return [*notes, files] if files else notes


def suffix_of(path: str) -> str:
    """Return the suffix of a file in lower case, or `no suffix`."""
    return printable(os.path.splitext(path)[1].lower()) or "no suffix"


def describe_counts(counts: Counter[str]) -> str:
    """List what was counted, the most frequent first, as `.heic: 20, hidden: 3`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(f"{name}: {count}" for name, count in ordered[:8]) + more


def stored_path(path: str) -> str:
    """Return a path as text that is valid in UTF-8; `real_path` is the inverse.

    A byte that is not UTF-8 is kept as a NUL, which no path holds, and two hexadecimal digits.
    """
    if path.isascii():
        return path
    return "".join(f"\0{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in path)


def real_path(stored: str) -> str:
    """Return the path that `stored_path` made text of."""
    return re.sub("\0([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), stored)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read
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
