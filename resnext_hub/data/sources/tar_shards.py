"""WebDataset shards that are read in place: by the place of each image, or in order if they are compressed."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.data.sources.streamed import Row, group_rows

if TYPE_CHECKING:
    import pyarrow

Version = tuple[int, int, int]


def version_of(path: Path) -> Version:
    """Return what changes when a file is written or replaced."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, eq=False)
class TarShard:
    """A tar file whose samples have been listed."""

    path: Path
    version: Version
    names: "pyarrow.BinaryArray"
    """Name of each image, in the encoding of the file system."""
    labels: np.ndarray
    places: np.ndarray | None
    """Offset and size of each image, `(N, 2)`; None if the file is compressed."""
    contents: Callable[[Path], Iterator[bytes]]
    """Reads the images of a shard in order."""

    @property
    def groups(self) -> np.ndarray:
        """Small groups, or the whole shard if it is compressed."""
        return np.array([len(self.labels)]) if self.places is None else group_rows(len(self.labels))

    def read(self, first: int, last: int, label_column: str, image_column: str | None) -> Sequence[Row]:
        """Read rows; see `Shard`."""
        if version_of(self.path) != self.version:
            raise ValueError("it has changed")
        if self.places is None:
            contents = list(islice(self.contents(self.path), first, last))
        else:
            with open(self.path, "rb", buffering=0) as file:
                contents = [os.pread(file.fileno(), int(size), int(at)) for at, size in self.places[first:last]]
        # a path below a file exists nowhere, so it cannot be mistaken for that of an image
        paths = [f"{self.path}/{os.fsdecode(name)}" for name in self.names[first:last].to_pylist()]
        images: list[dict[str, Any]] = [
            {"bytes": content, "path": path} for content, path in zip(contents, paths, strict=True)
        ]
        return list(zip(images, self.labels[first:last].tolist(), strict=True))


def is_compressed(path: Path) -> bool:
    """Return whether a tar file is compressed, so that its content has to be read in order."""
    with open(path, "rb") as file:
        return file.read(262)[257:] != b"ustar"
