"""The interface of dataset layouts, and the opened dataset."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request
    from resnext_hub.data.sources.streamed import StreamedTable


@dataclass(frozen=True)
class Part:
    """The rows of a split from one file, with that file's own description of the columns."""

    name: str
    rows: int
    features: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OpenDataset:
    """Tables of undecoded images by split, and what is known about them."""

    tables: "Mapping[str, datasets.Dataset] | Mapping[str, StreamedTable]"
    parts: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    """The files of each split in the order of their rows; empty if a split is not made of several files."""
    files: Sequence[tuple[str, int]] = ()
    """Names and sizes of the files, for the fingerprint."""
    roots: tuple[str, ...] | None = ()
    """Folders that must contain the files that rows refer to by path; None if the paths were listed locally."""
    revision: str | None = None
    """Commit of a Hub dataset."""
    stated: dict[str, int] = field(default_factory=dict)
    """Number of rows of each split according to the source."""
    configuration: str | None = None
    """Name of the configuration of a local repository's README.md."""
    notes: tuple[str, ...] = ()
    """Lines for the log: how the layout was interpreted, and which files are ignored."""

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
            RequestError: If it cannot be opened as labeled images.
            RunError: If the Hub cannot be reached.
        """
