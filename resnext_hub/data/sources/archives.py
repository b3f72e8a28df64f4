"""Zip and tar archives of a dataset, unpacked to the cache and opened as the folder that they contain."""

import hashlib
import logging
import lzma
import os
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from filelock import FileLock

from resnext_hub.data.sources.parquet import pointer_reason
from resnext_hub.data.sources.walk import is_hidden
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import remove_folder
from resnext_hub.machine import cache_folder
from resnext_hub.text import printable

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Suffixes of archives that can be unpacked."""

MAX_RATIO = 200
"""Greatest size of the content, as a multiple of the size of the archive; images are hardly ever compressed by it."""

SPARE_BYTES = 1 << 30
"""Size of the content that is accepted in any case."""

MAX_MEMBERS = 50_000_000
"""Most files in an archive."""

_CHUNK = 1 << 20

_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    struct.error,
    RuntimeError,  # from zipfile: encrypted
    NotImplementedError,  # from zipfile: an unknown compression
    ValueError,
    OverflowError,
)
"""What reading a damaged or unusual archive raises, besides OSError."""

_logger = logging.getLogger(__name__)


class _Member(NamedTuple):
    """A file in an archive."""

    path: str
    """Its path below the folder, with slashes."""
    content: IO[bytes] | None
    """None for a link."""
    target: str = ""
    """What a link refers to, below the folder."""


def is_archive(path: Path) -> bool:
    """Return whether a path is that of a zip or tar file, by its suffix."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def unpack(path: Path) -> Path:
    """Unpack an archive to the cache, once for each version of the file, and return the folder.

    Only regular files are written, only below that folder, and without their permissions. Hidden files, those of
    operating systems, and links to anything but a file of the archive are left out.

    Raises:
        RequestError: If the archive is damaged or encrypted, contains a path that leads outside, or is far larger than
            images could be.
        RunError: If the disk of the cache is full, or the cache is not writable.
    """
    name = re.sub(r"[^\w.-]+", "_", path.name)
    target = cache_folder() / "unpacked" / f"{name}-{_version_of(path)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                _logger.info("unpacking %s to %s", printable(path), printable(target))
                aside = target.with_name(f".partial-{target.name}")
                remove_folder(aside)
                aside.mkdir()
                _unpack(path, aside)
                os.sync()  # once, because syncing each file would take longer than unpacking
                os.rename(aside, target)
    except OSError as error:
        if error.errno is None:  # from a decompressor
            raise RequestError(f"{printable(path)} cannot be unpacked: {one_line(error)}") from error
        where = f"{printable(path)} cannot be unpacked to {printable(target)}: {error.strerror or one_line(error)}"
        raise RunError(f"{where}; set RESNEXT_HUB_CACHE to a folder with enough space") from error
    return target


def _version_of(path: Path) -> str:
    """Return a digest that changes when the file is written or replaced."""
    status = path.stat()
    facts = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()[:16]


def _unpack(path: Path, folder: Path) -> None:
    limit = SPARE_BYTES + MAX_RATIO * path.stat().st_size
    links: list[_Member] = []
    with _reported(path):
        for number, member in enumerate(_members(path, limit)):
            if number >= MAX_MEMBERS:
                raise ValueError(f"it has more than {MAX_MEMBERS:,} files")
            if member.content is None:
                links.append(member)
            else:
                limit -= _write(member.content, _place(folder, member.path), limit)
        for link in links:
            source = folder / link.target
            if source.is_file():
                limit -= source.stat().st_size
                _require_room(limit)
                shutil.copyfile(source, _place(folder, link.path))


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Raise RequestError for a damaged archive."""
    try:
        yield
    except _DAMAGED as error:
        # tarfile lists why it is not each kind of tar file
        unknown = "it is not a tar file" if "could not be opened" in str(error) else None
        reason = pointer_reason(path) or unknown or one_line(error)
        raise RequestError(f"{printable(path)} cannot be unpacked: {reason}") from error


def _members(path: Path, limit: int) -> Iterator[_Member]:
    """Yield the files of an archive in their order.

    Raises:
        ValueError: If a path leads outside the archive, or its content is larger than `limit`.
    """
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            _require_room(limit - sum(info.file_size for info in archive.infolist()))
            for info in archive.infolist():
                kept = None if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) else _path_of(info.filename)
                if kept:
                    with archive.open(info) as content:
                        yield _Member(kept, content)
        return
    with tarfile.open(path) as packed:
        for member in packed:
            packed.members = []  # type: ignore[attr-defined] # tarfile would keep every header in memory
            kept = _path_of(member.name) if member.isreg() or member.islnk() or member.issym() else None
            if kept and member.isreg():
                yield _Member(kept, packed.extractfile(member))
            elif kept:
                start = "" if member.islnk() else posixpath.dirname(kept)
                target = posixpath.normpath(posixpath.join(start, member.linkname))
                if not target.startswith(("/", "..")):
                    yield _Member(kept, None, target)


def _path_of(name: str) -> str | None:
    """Return the path of a file below the folder, or None for a hidden one.

    Raises:
        ValueError: If it leads outside.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
        raise ValueError(f"its file {printable(name)[:200]} leads outside the archive")
    return None if any(map(is_hidden, parts)) else "/".join(parts) or None


def _place(folder: Path, path: str) -> Path:
    place = folder / path
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{printable(path)} is in a folder that has the name of a file") from error
    if place.is_dir():
        raise ValueError(f"{printable(path)} has the name of a folder")
    return place


def _write(content: IO[bytes], place: Path, limit: int) -> int:
    """Write a file and return its size."""
    written = 0
    with open(place, "wb") as file:
        while chunk := content.read(_CHUNK):
            written += len(chunk)
            _require_room(limit - written)
            file.write(chunk)
    return written


def _require_room(left: int) -> None:
    if left < 0:
        raise ValueError(
            f"its content is more than {MAX_RATIO} times as large as the archive itself, so it may be a decompression "
            "bomb; if it is not, unpack it and use the folder"
        )
