"""Files that are written atomically, and read only if they are regular files."""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from resnext_hub.errors import RequestError, one_line
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

_PARTIAL = ".partial-"

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the pointer files that `git lfs` leaves in place of files that it has not fetched."""

JSON_BYTES = 1 << 28
"""Largest JSON file in bytes; a record with thousands of classes has a few megabytes."""

Content = TypeVar("Content")


class NotAFileError(OSError):
    """A path that is not a regular file: a folder, a FIFO, a socket or a device."""


class FileTooLargeError(OSError):
    """A file larger than any valid file of its kind."""


def read_regular(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Return the content of a regular file, following links.

    Nothing else is opened: a FIFO would block, and a device could deliver bytes forever.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        NotAFileError: If it is not a regular file.
        FileTooLargeError: If it is larger than the limit.
        OSError: If it cannot be read.
    """
    _require_file(os.stat(path).st_mode, path)  # opening some devices has effects of its own
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _require_file(status.st_mode, path)  # it may have been replaced since
        if limit is not None and status.st_size > limit:
            raise FileTooLargeError(f"{printable(path)} has {status.st_size} bytes, more than {limit}")
        return file.read()


def read_json(
    path: Path, kind: type[Content], way_out: str, limit: int = JSON_BYTES, name: str | None = None
) -> Content:
    """Read a JSON file and validate it against a type.

    Args:
        path: The file.
        kind: Type of its content, such as a dataclass or a mapping; msgspec validates it and ignores unknown keys.
        way_out: End of the error message: what the user can do if the file is damaged.
        limit: Largest size in bytes.
        name: How a message names the file; its path if not given.

    Raises:
        RequestError: If it is not a regular file, cannot be read, or has other content.
    """
    import msgspec

    name = printable(path) if name is None else name
    try:
        return msgspec.json.decode(read_regular(path, limit), type=kind)
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or one_line(error)}; {way_out}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise RequestError(f"{name} is damaged ({reason}); {way_out}") from error


def require_regular(path: Path) -> None:
    """Raise NotAFileError if a path that a library will open is not a regular file."""
    _require_file(os.stat(path).st_mode, path)


def convert(content: Any, kind: type[Content], path: Path, way_out: str) -> Content:
    """Validate the content of a file against a type; unknown fields are refused.

    Args:
        content: Decoded JSON.
        kind: A dataclass, or another type that msgspec validates.
        path: The file, for the error message.
        way_out: End of the error message: what the user can do if the file is damaged.

    Raises:
        RequestError: If the content is not of that type.
    """
    import msgspec

    try:
        converted = msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RequestError(f"{printable(path)} is damaged ({one_line(error)}); {way_out}") from error
    unknown = _unknown_fields(content, converted)
    if unknown:
        raise RequestError(f"{printable(path)} is damaged (unknown field {printable(unknown)[:80]}); {way_out}")
    return converted


def _unknown_fields(content: Any, converted: Any) -> str | None:
    """Return the first key of nested content that the dataclass it was converted to has no field for."""
    if not dataclasses.is_dataclass(converted):
        return None
    known = {field.name for field in dataclasses.fields(converted)}
    for name, value in content.items():
        if name not in known:
            return str(name)
        inner = _unknown_fields(value, getattr(converted, name))
        if inner is not None:
            return f"{name}.{inner}"
    return None


def _require_file(mode: int, path: object) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise NotAFileError(f"not a regular file but {kind}")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a temporary file, flush it to disk, and rename it over the old one; on failure the old one stays."""
    aside = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; floats round-trip exactly, and NaN is refused."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_files(*paths: Path) -> Iterator[Path]:
    """Write several files of one folder in a temporary folder, then move them into place in order.

    The last file marks the set as complete: its old version is removed first and its new version moved last, so it
    never stands beside files of another set. On failure the old files stay.
    """
    *_, last = paths
    aside = last.with_name(f"{_PARTIAL}files-of-{last.name}")
    with new_folder(aside) as filling:
        yield filling
    last.unlink(missing_ok=True)
    for path in paths:
        os.replace(aside / path.name, path)
    aside.rmdir()
    _sync_folder(last.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder, then replace the old one by it as a whole; on failure the old one stays."""
    aside = path.with_name(f"{_PARTIAL}{path.name}")
    remove_folder(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    mode = aside.stat().st_mode & 0o666  # what the umask leaves; safetensors keeps its files to their owner
    for folder, _, files in os.walk(aside):
        for name in files:
            _where_possible("permissions", functools.partial(os.chmod, Path(folder, name), mode))
            _sync_file(Path(folder, name))
        _sync_folder(Path(folder))
    remove_folder(path)
    os.rename(aside, path)
    _sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists, so that it never stands half removed under its own name.

    Of a link to a folder only the link is removed: its target may belong to somebody else.
    """
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        doomed = path.with_name(f"{_PARTIAL}removed-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that interrupted writes have left directly in a folder."""
    for leftover in folder.glob(f"{_PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


_HASHED_AT_ONCE = 1 << 23
"""Bytes; between blocks, a thread may wait milliseconds for the interpreter."""


def same_content(path: Path, sha256: str | None, blob_id: str | None) -> bool:
    """Return whether a file is the one that the Hub lists: by SHA-256 for large files, else by git's blob hash."""
    if sha256 is not None:
        return sha256_of(path) == sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == blob_id


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    _where_possible("flushing folders", lambda: _sync_descriptor(path))


def _sync_descriptor(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str, destination: str) -> None:
    """Hard-link a file that never changes, or copy it if the file system has no hard links."""
    if not _where_possible("hard links", lambda: os.link(source, destination)):
        shutil.copyfile(source, destination)


_UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EXDEV))
"""Error numbers by which file systems and network shares report that they do not support an operation."""


def _where_possible(what: str, work: Callable[[], None]) -> bool:
    """Run an operation that not every file system supports; return whether it is supported, and warn once if not."""
    try:
        work()
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(what, error.strerror)
        return False
    return True


@functools.cache
def _warn_once(what: str, reason: str) -> None:
    _logger.warning("not supported by the file system, and therefore not used: %s (%s)", what, reason)
