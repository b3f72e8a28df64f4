"""How a dataset layout is recognized and opened, and what it is opened as."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request


@dataclass(frozen=True)
class Part:
    """Rows of a split that come from one file, with the columns as that file itself describes them."""

    name: str
    rows: int
    features: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OpenDataset:
    """Tables of undecoded images by split, and what was found out about them."""

    tables: "dict[str, datasets.Dataset | datasets.IterableDataset]"
    parts: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    """The files of each split in the order of their rows; empty where a split is of one piece."""
    files: tuple[tuple[str, int], ...] = ()
    """Names and sizes of the files, for the fingerprint."""
    roots: tuple[str, ...] | None = ()
    """Folders in which files have to lie whose paths stand in rows; None where the paths were listed here."""
    revision: str | None = None
    """Commit of a Hub dataset."""
    stated: dict[str, int] = field(default_factory=dict)
    """Number of rows of each split as the source states it."""
    configuration: str | None = None
    """Name of the configuration of a local repository's README.md."""
    notes: tuple[str, ...] = ()
    """Lines for the log: what was left out and how the layout was understood."""

    def with_notes(self, notes: Iterable[str]) -> "OpenDataset":
        """Return the same dataset with more notes."""
        return replace(self, notes=(*self.notes, *notes))


class Source(Protocol):
    """A dataset layout."""

    def matches(self, request: "Request") -> bool:
        """Return whether a requested dataset has this layout; the first source that matches opens it."""

    def open(self, request: "Request") -> OpenDataset:
        """Open the dataset.

        Raises:
            RequestError: If it cannot be opened as labelled images.
            RunError: If the Hub cannot be reached.
        """
