"""Find the image that a row of a table refers to."""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from resnext_hub.data.sources.names import loose_role
from resnext_hub.data.sources.texts import NameIndex
from resnext_hub.data.sources.walk import Tree
from resnext_hub.errors import RequestError
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    from resnext_hub.data.sources.table_columns import Table

Find = Callable[["Table", str], int | None]
"""Finds the image of a row, given the table and the file name."""

_ODD_PATH = re.compile(r"[^\x20-\x7e]|\\|//|(?:^|/)\.{1,2}(?:/|$)|^/|/$")
"""Paths that could refer to a file although they are spelled differently from its own."""


def finder(tree: Tree) -> Find:
    """Return a function that finds the image of a row by its path relative to the table.

    File names may be absolute, contain backslashes, or differ from the file's path in Unicode normalization.
    """
    index = NameIndex(tree.images)
    alike: dict[str, int | None] = {}
    for i, path in enumerate(tree.images):
        if not path.isascii():
            normal = unicodedata.normalize("NFC", path)
            alike[normal] = None if normal in alike else i
    roots = [os.path.join(folder, "") for folder in (os.path.abspath(tree.root), os.path.realpath(tree.root))]

    def exact(path: str) -> int | None:
        for i in index.find(path):
            if tree.images[i] == path:
                return i
        return None

    def find(table: "Table", name: str) -> int | None:
        folder = table.folder
        place = exact(f"{folder}/{name}" if folder else name)
        if place is not None or not _ODD_PATH.search(name):
            return place
        for written in (name, name.replace("\\", "/")):
            path = posixpath.normpath(posixpath.join(folder, written))
            for root in roots:
                path = path.removeprefix(root)
            place = exact(path)
            if place is None:
                place = alike.get(unicodedata.normalize("NFC", path))
            if place is not None:
                return place
        return None

    return find


class ImageFinder:
    """Finds the image of a row: by its path relative to the table, else by the end of the path, with or without suffix.

    Args:
        tree: The files of the dataset.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._exact = finder(tree)
        self._root = unicodedata.normalize("NFC", os.path.abspath(tree.root)).split("/")
        self._folders = {
            part for folder in tree.image_folders for part in unicodedata.normalize("NFC", folder).split("/")
        }
        self._depth = len(self._root) + max((folder.count("/") + 1 for folder in tree.image_folders), default=0)
        self._ends: dict[tuple[int, str | None], _Ends] = {}
        self._within: dict[str, str | None] = {}
        """The folder that has to contain the images of a table, if any."""
        self.count = len(tree.images)

    def __call__(self, table: "Table", name: str) -> int | None:
        """Return the index of the image, or None if there is none.

        Args:
            table: The table.
            name: The file name in it.

        Raises:
            RequestError: If several images match.
        """
        found = self.candidates(table, name)
        if len(found) > 1:
            paths = (self._tree.images[index] for index in found)
            raise RequestError(
                f"{printable(self._tree.root)}: the file name {printable(name)} in a table matches several images "
                f"({listing(paths, 3)}); write the path relative to the table"
            )
        return found[0] if found else None

    def candidates(self, table: "Table", name: str) -> Sequence[int]:
        """Return the images that a file name could refer to, at most two; one if its path is exact.

        If there is a folder with the name of the table, such as train/ for train.csv, only images inside it match.
        """
        exact = self._exact(table, name)
        if exact is not None:
            return (exact,)
        path = unicodedata.normalize("NFC", name.replace("\\", "/")).strip("/")
        if table.path not in self._within:
            split = split_of(table)
            self._within[table.path] = split if split in self._folders else None
        return tuple(islice(self._ending(path, self._within[table.path]), 2))

    def _ending(self, path: str, within: str | None) -> Iterator[int]:
        """Yield the images whose path has this end, inside a folder if one is given."""
        depth = path.count("/")
        if depth > self._depth:
            return iter(())
        # an index for each number of folders, so that a name that many folders have is not compared with all of them
        if (depth, within) not in self._ends:
            self._ends[depth, within] = _Ends(self._tree, self._root, depth, within)
        return self._ends[depth, within].find(path)


class _Ends:
    """An index of the ends of paths: the name, with or without suffix, and some of the folders above it.

    Args:
        tree: The files of the dataset.
        root: Parts of the path of its folder.
        depth: Number of folders in each end.
        within: Name of a folder that has to contain an image; any if not given.
    """

    def __init__(self, tree: Tree, root: Sequence[str], depth: int, within: str | None) -> None:
        self._tree, self._root, self._depth, self._within = tree, root, depth, within
        self._index = NameIndex(key for path in tree.images for key in self._keys(path))

    def _keys(self, path: str) -> tuple[str, str]:
        """Return the end of a path with and without the suffix of the file; impossible ones for a path without it."""
        folder, _, name = unicodedata.normalize("NFC", path).rpartition("/")
        folders = folder.split("/") if folder and (self._depth or self._within) else []
        if self._within is not None and self._within not in folders:
            return _NOTHING
        if self._depth:
            above = folders[-self._depth :]
            missing = self._depth - len(above)
            if missing > len(self._root):
                return _NOTHING
            name = "/".join([*(self._root[-missing:] if missing else ()), *above, name])
        return name, name[: name.rindex(".")]

    def find(self, path: str) -> Iterator[int]:
        """Yield the images whose path ends so, in their order."""
        for place in self._index.find(path):
            if path in self._keys(self._tree.images[place // 2]):
                yield place // 2


_NOTHING = ("/", "/")
"""Ends that no file name has."""


def split_of(table: "Table") -> str | None:
    """Return the split that the name of a table states, such as train.csv."""
    name = posixpath.basename(table.path).rpartition(".")[0]
    return name if loose_role(name) else None
