"""Lists of images to leave out of training and evaluation, as `resnext-hub check` writes them.

The first line is a JSON object with the digest of the dataset that the list is for, each other line a JSON array of the
split, the row of the image in it, its name, and the reason.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from resnext_hub.errors import RequestError, setting
from resnext_hub.files import FileTooLargeError, read_regular
from resnext_hub.text import listing, printable

MAX_BYTES = 1 << 30
"""Greatest size of a list."""

Entry = tuple[str, int, str, str]
"""Split, row, name and reason."""


@dataclass(frozen=True)
class Exclusions:
    """A list of excluded images."""

    entries: tuple[Entry, ...] = ()
    dataset: str | None = None
    """Digest of the dataset that the list is for."""
    rows: dict[str, set[int]] = field(default_factory=dict)
    """Excluded rows by split."""

    def require_dataset(self, digest: str, splits: Iterable[str]) -> None:
        """Raise RequestError if the list is for another dataset, another version of it, or an unknown split."""
        if self.dataset is None:
            return
        unknown = sorted(set(self.rows).difference(splits))
        if self.dataset != digest or unknown:
            why = f"it lists images of {listing(unknown)}" if unknown else f"its digest is not {digest[:8]}"
            raise RequestError(
                f"the list in {setting('exclude')} was made for a different dataset, or a different version of this "
                f"one ({why}); run resnext-hub check again"
            )

    def kept(self, split: str, count: int) -> np.ndarray:
        """Return which rows of a split are not excluded, `(count,)` bool.

        Raises:
            RequestError: If a row does not exist.
        """
        kept = np.ones(count, dtype=bool)
        rows = np.array(sorted(self.rows.get(split, ())), dtype=np.int64)
        if len(rows) and rows[-1] >= count:
            raise RequestError(
                f"{setting('exclude')} lists row {rows[-1]} of {printable(split)}, which has {count} rows; run "
                "resnext-hub check again"
            )
        kept[rows] = False
        return kept


def read_exclusions(path: str | None) -> Exclusions:
    """Read a list of excluded images; without a path, none are excluded.

    Raises:
        RequestError: If the file cannot be read, or is not such a list.
    """
    if path is None:
        return Exclusions()
    where = setting("exclude", printable(path))
    try:
        first, *lines = read_regular(os.path.expanduser(path), limit=MAX_BYTES).splitlines()
        dataset = msgspec.json.decode(first, type=dict[str, str])["dataset"]
        decoder = msgspec.json.Decoder(tuple[str, int, str, str])
        entries = tuple(decoder.decode(line) for line in lines if line.strip())
    except (OSError, FileTooLargeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{where} cannot be read: {reason}") from error
    except (ValueError, KeyError, RecursionError) as error:  # msgspec.DecodeError is a ValueError
        raise RequestError(f"{where} is not a list written by resnext-hub check --write-exclude") from error
    rows: dict[str, set[int]] = {}
    for split, row, _, _ in entries:
        if row < 0:
            raise RequestError(f"{where} lists row {row} of {printable(split)}; expected a row number of 0 or more")
        rows.setdefault(split, set()).add(row)
    return Exclusions(entries, dataset, rows)


def exclusion_list(dataset: str, entries: Iterable[Entry]) -> str:
    """Return a list of excluded images as text; `read_exclusions` is the inverse.

    Args:
        dataset: Digest of the dataset.
        entries: The images; repeated ones are written once.
    """
    once: Mapping[tuple[str, int], Entry] = {entry[:2]: entry for entry in entries}
    lines = [json.dumps({"dataset": dataset}), *(json.dumps(entry) for entry in once.values())]
    return "\n".join(lines) + "\n"
