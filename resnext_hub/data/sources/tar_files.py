"""Read tar files strictly: where tarfile would silently stop, loop or read a header of any size, an error is raised."""

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnext_hub.data.sources.limits import content_limit, require_room
from resnext_hub.errors import one_line
from resnext_hub.files import require_regular

_HEADER_BYTES = 1 << 20
"""Most bytes of an extended header, such as a long name, which tarfile reads as a whole."""

_HEADERS_BYTES = 4 * _HEADER_BYTES
"""Most bytes of all headers of one file: several extended ones, and the map of a sparse file."""

_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Header(tarfile.TarInfo):
    """A header whose damage is an error at any place of the file; tarfile takes it for the end, except at the start."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> "_Header":
        """Parse a header; an impossible or enormous size is an error, because tarfile would loop or read all of it."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _HEADER_BYTES):
            raise tarfile.ReadError(f"a header declares a size of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> "_Header":
        """Read the next header; only the regular end of the file is not an error."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # missing in typeshed; two blocks of zeros, the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is truncated or damaged ({one_line(error)})") from error


class _Counted:
    """A file that is decompressed while it is read, up to a limit; bytes that are skipped are decompressed as well."""

    def __init__(self, file: Any, limit: int) -> None:
        self._file, self._limit = file, limit
        self.header_left: int | None = _HEADERS_BYTES
        """Bytes that may be read of the headers of a file; None outside of headers."""

    def read(self, size: int) -> bytes:
        """Read some bytes."""
        require_room(self._limit - self._file.tell() - size)
        if self.header_left is not None:
            self.header_left -= size
            if self.header_left < 0:
                raise ValueError(f"the headers of one of its files have more than {_HEADERS_BYTES} bytes")
        return bytes(self._file.read(size))

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Skip to a place, if that is within the limit."""
        require_room(self._limit - place)
        return int(self._file.seek(place, whence))

    def tell(self) -> int:
        """Return the number of decompressed bytes before the current place."""
        return int(self._file.tell())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Tar(tarfile.TarFile):
    tarinfo = _Header

    @classmethod
    def taropen(cls, name: Any, mode: Any = "r", fileobj: Any = None, **options: Any) -> "_Tar":
        """Open the tar file in a decompressed file, or an uncompressed one, which cannot be larger than it is."""
        limit = options.pop("limit")
        counted: Any = None if fileobj is None else _Counted(fileobj, limit)
        return super().taropen(name, mode, counted, **options)


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar file, compressed or not.

    Raises:
        ValueError: If it is damaged, or its content is far larger than the file, here or while it is read in the block.
        OSError: If it cannot be read.
    """
    require_regular(path)
    try:
        with _Tar.open(path, limit=content_limit(path)) as archive:  # type: ignore[call-overload] # passed to taropen
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, LookupError, RecursionError) as error:
        # tarfile lists why it is not each kind of tar file
        reason = "it is not a tar file" if "could not be opened" in str(error) else one_line(error)
        raise ValueError(reason) from error


def headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar file without keeping them in memory.

    Raises:
        ValueError: If a header is not behind the previous one, or data follows the end.
    """
    last = -1
    while (member := _next(archive)) is not None:
        archive.members = []  # type: ignore[attr-defined] # where tarfile keeps every header; missing in typeshed
        if member.offset <= last:
            raise ValueError("its headers are not in order")
        last = member.offset
        yield member
    # what is left is the rest of a record of zeros
    if archive.fileobj is not None and any(archive.fileobj.read(2 * tarfile.RECORDSIZE)):
        raise ValueError("data follows the end of its last file")


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    counted = archive.fileobj if isinstance(archive.fileobj, _Counted) else None
    if counted is None:
        return archive.next()
    counted.header_left = _HEADERS_BYTES
    member = archive.next()
    counted.header_left = None
    return member
