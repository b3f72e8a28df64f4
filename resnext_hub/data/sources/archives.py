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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from filelock import FileLock

from resnext_hub.data.sources.limits import content_limit, require_room
from resnext_hub.data.sources.parquet import pointer_reason
from resnext_hub.data.sources.tar_files import headers, open_tar
from resnext_hub.data.sources.walk import is_hidden
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import remove_folder, require_regular, write_atomic
from resnext_hub.machine import cache_folder
from resnext_hub.text import printable

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Suffixes of archives that can be unpacked."""

MAX_MEMBERS = 50_000_000
"""Most files in an archive."""

_FORMAT = 2
"""Version of the rules by which archives are unpacked; increment it when they change."""

_CHUNK = 1 << 20

_SAMPLES, _SAMPLE_BYTES = 64, 4096
"""Number and size of the samples of an archive that are part of its version."""

_DIRECTORY_BYTES = 1 << 26
"""Most bytes of the directory of a zip file that are part of its version; those of a million files."""

_END_BYTES = 22 + (1 << 16)
"""Most bytes from the last record of a zip file, which states the size of the directory, to its end."""

_ENTRY = 4096
"""Bytes that each entry counts besides its content, for the file system."""

_LINK_BYTES = 4096
"""Most bytes of the target of a link in a zip file."""

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
    LookupError,
    OverflowError,
)
"""What reading a damaged or unusual archive raises, besides OSError."""

_logger = logging.getLogger(__name__)


class _Member(NamedTuple):
    """An entry of an archive; without a path it is left out."""

    path: str | None
    """Its path below the folder, with slashes."""
    content: IO[bytes] | None = None
    """None for a link, and for an entry that is left out."""
    target: str = ""
    """What a link refers to, below the folder."""
    skipped: int = 0
    """Size of an entry that is left out, which has to be read all the same."""


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
    count = target.with_name(f"{target.name}.count")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_complete(target, count):
                _logger.info("unpacking %s to %s", printable(path), printable(target))
                _fill(path, target)
                write_atomic(count, f"{_count_files(target)}\n")
    except OSError as error:
        if error.errno is None:  # from a decompressor
            raise RequestError(f"{printable(path)} cannot be unpacked: {one_line(error)}") from error
        where = f"{printable(path)} cannot be unpacked to {printable(target)}: {error.strerror or one_line(error)}"
        raise RunError(f"{where}; set RESNEXT_HUB_CACHE to a folder with enough space") from error
    return target


def _is_complete(folder: Path, count: Path) -> bool:
    """Return whether an unpacked folder still has all its files: a cleaner of caches may have removed some."""
    try:
        return folder.is_dir() and int(count.read_text("utf-8")) == _count_files(folder)
    except (OSError, ValueError):
        return False


def _count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _fill(path: Path, target: Path) -> None:
    """Unpack to a folder aside, and rename it when it is complete."""
    aside = target.with_name(f".partial-{target.name}")
    for folder in (aside, target):
        remove_folder(folder)
    aside.mkdir()
    try:
        _unpack(path, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    os.sync()  # once, because syncing each file would take longer than unpacking
    os.rename(aside, target)


def _version_of(path: Path) -> str:
    """Return a digest that changes when the file is written or replaced.

    Times may be preserved or missing, so parts of the content count as well: the start, the end, samples of the rest,
    and the directory of a zip file, which has a checksum of each file. Of a large archive, only these parts are read.
    """
    require_regular(path)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        facts = (_FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest = hashlib.sha256(repr(facts).encode(errors="surrogateescape"))
        places = [(0, _CHUNK), (max(0, status.st_size - _CHUNK), _CHUNK)]
        places += [(status.st_size * i // _SAMPLES, _SAMPLE_BYTES) for i in range(1, _SAMPLES)]
        for start, length in (*places, _zip_directory(file, status.st_size)):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()[:16]


def _zip_directory(file: IO[bytes], size: int) -> tuple[int, int]:
    """Return offset and length of the directory of a zip file, at most `_DIRECTORY_BYTES` long, or zeros."""
    start = max(0, size - _END_BYTES)
    file.seek(start)
    end = file.read(_END_BYTES)
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) < at + 16:
        return 0, 0
    length = min(int.from_bytes(end[at + 12 : at + 16], "little"), _DIRECTORY_BYTES, start + at)
    return start + at - length, length


def _unpack(path: Path, folder: Path) -> None:
    limit = content_limit(path)
    links: list[_Member] = []
    with _reported(path):
        for number, member in enumerate(_members(path, limit)):
            if number >= MAX_MEMBERS:
                raise ValueError(f"it has more than {MAX_MEMBERS:,} files")
            limit -= _ENTRY + member.skipped
            require_room(limit)
            if member.path is None:
                continue
            if member.content is None:
                links.append(member)
            else:
                limit -= _write(member.content, _place(folder, member.path), limit)
        left = _copy_links(folder, links, limit)
    if left:
        _logger.warning(
            "%s: ignored %d links whose targets are not in the archive, such as %s",
            printable(path),
            len(left),
            printable(left[0].path),
        )


def _copy_links(folder: Path, links: Sequence[_Member], limit: int) -> list[_Member]:
    """Copy what links refer to, also through other links; return those that lead to nothing."""
    waiting = list(links)
    while waiting:
        left = []
        for link in waiting:
            source = folder / (link.target or ".missing")
            if source.is_file():
                found = [(source, str(link.path))]
            elif source.is_dir():
                inner = [file for file in sorted(source.rglob("*")) if file.is_file()]
                found = [(file, f"{link.path}/{file.relative_to(source).as_posix()}") for file in inner]
            else:
                left.append(link)
                continue
            for file, path in found:
                limit -= _ENTRY + file.stat().st_size
                require_room(limit)
                place = _place(folder, path)
                if not place.exists():
                    shutil.copyfile(file, place)
        if len(left) == len(waiting):
            return left
        waiting = left
    return []


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Raise RequestError for a damaged archive."""
    try:
        yield
    except _DAMAGED as error:
        reason = pointer_reason(path) or one_line(error)
        raise RequestError(f"{printable(path)} cannot be unpacked: {reason}") from error


def _members(path: Path, limit: int) -> Iterator[_Member]:
    """Yield the entries of an archive in their order.

    Raises:
        ValueError: If a path leads outside the archive, or its content is larger than `limit`.
    """
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            require_room(limit - sum(info.file_size for info in archive.infolist()))
            for info in archive.infolist():
                kept = None if info.is_dir() else _path_of(info.filename)
                if kept is None:
                    yield _Member(None)
                    continue
                with archive.open(info) as content:
                    if stat.S_ISLNK(info.external_attr >> 16):
                        yield _link(kept, content.read(_LINK_BYTES).decode(errors="surrogateescape"))
                    else:
                        yield _Member(kept, content)
        return
    with open_tar(path) as packed:
        for member in headers(packed):
            kept = _path_of(member.name) if member.isreg() or member.islnk() or member.issym() else None
            if kept is None:
                yield _Member(None, skipped=member.size)
            elif member.isreg():
                yield _Member(kept, packed.extractfile(member))
            else:
                yield _link(kept, member.linkname, from_root=member.islnk())


def _link(path: str, target: str, from_root: bool = False) -> _Member:
    """Return a link as a member; one that leads outside, or to itself, is left out."""
    start = "" if from_root else posixpath.dirname(path)
    place = posixpath.normpath(posixpath.join(start, target))
    inside = not place.startswith(("/", ".")) and "\0" not in place and not f"{path}/".startswith(f"{place}/")
    return _Member(path, None, place if inside else "")


def _path_of(name: str) -> str | None:
    """Return the path of a file below the folder, or None for a hidden one.

    Raises:
        ValueError: If it leads outside.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
        raise ValueError(f"its path {printable(name)[:200]} leads outside the archive")
    return None if any(map(is_hidden, parts)) else "/".join(parts) or None


def _place(folder: Path, path: str) -> Path:
    place = folder / path
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"the folder of {printable(path)} has the same name as a file") from error
    if place.is_dir():
        raise ValueError(f"{printable(path)} has the same name as a folder")
    return place


def _write(content: IO[bytes], place: Path, limit: int) -> int:
    """Write a file and return its size."""
    written = 0
    with open(place, "wb") as file:
        while chunk := content.read(_CHUNK):
            written += len(chunk)
            require_room(limit - written)
            file.write(chunk)
    return written
