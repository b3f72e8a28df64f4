"""Infer splits from the names of folders and files, and class names from labels."""

import posixpath
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from resnext_hub.errors import RequestError
from resnext_hub.text import printable

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")
EVAL_NAMES = ("validation", "valid", "val", "dev", *TEST_NAMES, "eval", "evaluation")
"""Usual names of evaluation splits, in order of preference."""

FILE_COLUMN = re.compile(r"(?:^|[^a-z])(?:id|image|img|file|filename|path|name)(?:$|[^a-z])", re.IGNORECASE)
"""Usual names of columns of file names; only in these are numbers without a suffix taken for file names."""

LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
"""Usual names of label columns, in any case, in order of preference."""

Role = Literal["train", "eval"]
"""Whether a split is trained or evaluated on."""


def is_label_name(name: str) -> bool:
    """Return whether a column has a usual name for labels."""
    return name.casefold() in LABEL_NAMES


def names_split(name: str) -> bool:
    """Return whether a column of truth values tells by its name that they stand for a split, such as `is_valid`."""
    return bool(re.match(rf"is[_ -]?({'|'.join((*TRAIN_NAMES, *EVAL_NAMES))})", name, re.IGNORECASE))


def split_role(name: str) -> Role | None:
    """Return the role of a split with exactly this name, such as `Train` or `val`, in any case."""
    return _role_of(name.lower())


def split_keyword(name: str) -> str | None:
    """Return the split that a name contains as a word: `val` for `cats-val-00000-of-00001`.

    A name that contains both a training and an evaluation split belongs to neither.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    keywords = [word for word in words if _role_of(word)]
    return keywords[0] if len({_role_of(word) for word in keywords}) == 1 else None


@lru_cache(maxsize=1 << 12)
def loose_role(name: str) -> Role | None:
    """Return the role of a split whose name contains one as a word, such as `seg_train` or `test_set`."""
    keyword = split_keyword(name)
    return _role_of(keyword) if keyword else None


def split_folder(path: str) -> str | None:
    """Return the topmost folder of a path that is named like a split; an exact name precedes one that contains it."""
    return _topmost_split(posixpath.dirname(path))


@lru_cache(maxsize=1 << 12)
def _topmost_split(folder: str) -> str | None:
    parts = folder.split("/")
    return next(filter(split_role, parts), None) or next(filter(loose_role, parts), None)


def likely_splits(splits: Iterable[str], role: Role | Literal["test"]) -> list[str]:
    """Return the most likely split for a role; several only if their names are equivalent."""
    splits = list(splits)
    names = {"train": TRAIN_NAMES, "eval": EVAL_NAMES, "test": TEST_NAMES}[role]
    for keyword in (str.lower, split_keyword):
        for name in names:
            found = [split for split in splits if keyword(split) == name]
            if found:
                return found
    return []


def class_names_of(raw: Iterable[str], where: str) -> dict[str, str]:
    """Return the class name of each label.

    Labels that differ only in Unicode normalization (NFC and NFD) are one class. Control characters and bytes that are
    not UTF-8 are escaped, so every class name can be printed and stored.

    Raises:
        RequestError: If escaping would give two classes the same name.
    """
    names: dict[str, str] = {}
    origins: dict[str, str] = {}
    for label in raw:
        normal = unicodedata.normalize("NFC", label)
        name = printable(normal)
        if origins.setdefault(name, normal) != normal:
            raise RequestError(f"{where} has two classes whose names are both displayed as {name}; rename one of them")
        names[label] = name
    return names


def _role_of(word: str) -> Role | None:
    return "train" if word in TRAIN_NAMES else "eval" if word in EVAL_NAMES else None
