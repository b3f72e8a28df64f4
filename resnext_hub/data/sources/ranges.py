"""Read parts of files over HTTP, such as single row groups of a parquet file."""

import io
import os
import re
from typing import NamedTuple

from resnext_hub.text import printable

_TIMEOUT = 60.0
"""Seconds without any data after which a request is repeated."""


class Remote(NamedTuple):
    """A file on a server, at the version that it had when it was opened."""

    url: str
    name: str
    """Its name in messages, without secrets."""
    size: int
    version: str
    """What the server states about its version; empty for a commit on the Hub, which cannot change."""


def hub_file(url: str) -> tuple[str, str] | None:
    """Return the address and the path in its repository of a file at a commit, `hf://datasets/owner/name@commit/path`.

    None if the URL is another one.
    """
    from huggingface_hub import hf_hub_url

    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url)
    return match and (hf_hub_url(match[1], match[3], repo_type="dataset", revision=match[2]), match[3])


def find_remote(url: str, name: str, fixed: bool) -> Remote:
    """Ask a server for the size and the version of a file.

    Args:
        url: Its address.
        name: Its name in messages.
        fixed: Whether its content cannot change.

    Raises:
        OSError, HTTPError: If it cannot be reached, or does not have the file.
        ValueError: If the server cannot send parts of files.
    """
    _, headers = _request(url, name, 0, 1)
    total = re.fullmatch(r"bytes 0-0/(\d+)", headers.get("content-range", ""))
    if total is None:
        raise ValueError(f"the server of {printable(name)} does not report the size of the file")
    version = "" if fixed else headers.get("etag") or headers.get("last-modified") or ""
    return Remote(url, name, int(total[1]), version)


def read_range(file: Remote, first: int, last: int) -> bytes:
    """Return the bytes of a file from `first` up to `last`, which is not included; failures are retried.

    Raises:
        OSError, HTTPError: If they cannot be read.
        ValueError: If the file has changed, or is truncated.
    """
    if first >= last:
        return b""
    content, headers = _request(file.url, file.name, first, last)
    version = headers.get("etag") or headers.get("last-modified") or ""
    if file.version and version != file.version:
        raise ValueError(f"{printable(file.name)} has changed")
    if len(content) != last - first:
        raise ValueError(f"{printable(file.name)} is truncated")
    return content


class RangeFile(io.RawIOBase):
    """A file on a server that is read in parts, each with one request."""

    def __init__(self, file: Remote) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the current place."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to another place."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Return up to a number of bytes."""
        last = self._file.size if size < 0 else min(self._place + size, self._file.size)
        content = read_range(self._file, self._place, last)
        self._place += len(content)
        return content


def _request(url: str, name: str, first: int, last: int) -> tuple[bytes, dict[str, str]]:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    on_hub = url.startswith(f"{constants.ENDPOINT}/")
    headers = build_hf_headers() if on_hub else {}  # others must not get the token
    headers |= {"Range": f"bytes={first}-{last - 1}", "Accept-Encoding": "identity"}
    response = http_backoff("GET", url, headers=headers, timeout=_TIMEOUT)
    if on_hub:
        hf_raise_for_status(response)
    elif response.status_code >= 400:  # its own message would have the address, perhaps with a password
        raise OSError(f"the server returned {response.status_code} for {printable(name)}")
    if response.status_code != 206:
        raise ValueError(f"the server of {printable(name)} does not support range requests")
    return response.content, dict(response.headers)
