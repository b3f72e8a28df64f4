"""Lists of images to leave out of training and evaluation, as `resnext-hub check` writes them.

Each line has the split, the row of the image in it, and its name, separated by tabs. The name guards against a list
that was made for another version of the dataset.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from resnext_hub.errors import RequestError, setting
from resnext_hub.files import FileTooLargeError, read_regular
from resnext_hub.text import printable

Exclusions = Mapping[str, Mapping[int, str]]
"""Names of excluded images, by split and row."""

MAX_BYTES = 1 << 30
"""Greatest size of a list."""


def read_exclusions(path: str | None) -> Exclusions:
    """Read a list of excluded images; without a path, none are excluded.

    Raises:
        RequestError: If the file cannot be read, or a line has another format.
    """
    found: dict[str, dict[int, str]] = {}
    if path is None:
        return found
    where = setting("exclude", printable(path))
    try:
        lines = read_regular(Path(path).expanduser(), limit=MAX_BYTES).decode().split("\n")
    except (OSError, FileTooLargeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a list of images"
        raise RequestError(f"{where} cannot be read: {reason}; expected a file that resnext-hub check wrote") from error
    for number, line in enumerate(lines, start=1):
        split, _, rest = line.partition("\t")
        row, _, name = rest.partition("\t")
        if not line.startswith("#") and line:
            if not (row.isascii() and row.isdigit() and len(row) < 12 and name):
                raise RequestError(
                    f"{where}: line {number} is {printable(line)[:80]}; expected a split, a row and a name, separated "
                    "by tabs"
                )
            found.setdefault(split, {})[int(row)] = name
    return found


def write_exclusions(images: Iterable[tuple[str, int, str, str]]) -> str:
    """Return a list of excluded images as text.

    Args:
        images: Split, row, name and, for a comment above the line, reason of each image.
    """
    lines = ["# images to exclude: split, row, name"]
    for split, row, name, reason in images:
        lines += [f"# {reason}", f"{split}\t{row}\t{name}"]
    return "\n".join(lines) + "\n"


def kept_rows(count: int, excluded: Mapping[int, str], split: str) -> np.ndarray:
    """Return the rows of a split that are not excluded, `(N,)` int64.

    Raises:
        RequestError: If an excluded row does not exist, or all rows are excluded.
    """
    kept = np.ones(count, dtype=bool)
    beyond = [row for row in excluded if row >= count]
    if beyond:
        raise RequestError(
            f"{setting('exclude')} lists row {min(beyond)} of {printable(split)}, which has {count} rows; the list was "
            "made for another dataset, so run resnext-hub check again"
        )
    kept[list(excluded)] = False
    if not kept.any():
        raise RequestError(f"{setting('exclude')} lists all images of {printable(split)}")
    return np.flatnonzero(kept)


def require_names(found: Mapping[int, str], excluded: Mapping[int, str], split: str) -> None:
    """Raise RequestError if a row has another name than in the list.

    Args:
        found: The names of the excluded rows in the dataset.
        excluded: Their names in the list.
        split: The split, for the message.
    """
    for row, name in found.items():
        if name != excluded[row]:
            raise RequestError(
                f"{setting('exclude')} lists row {row} of {printable(split)} as {printable(excluded[row])}, but it is "
                f"{name}; the list was made for another version of the dataset, so run resnext-hub check again"
            )
