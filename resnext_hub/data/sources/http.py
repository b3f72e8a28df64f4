"""Download a file over HTTP with the standard library, because fsspec needs further packages for it."""

import base64
import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.text import printable

_TIMEOUT = 30.0
"""Seconds without any data after which a connection is given up."""

_SAFE = "%/:=&?~#+!$,;'@()*[]"
"""Characters of a URL that are not quoted (again)."""


class _Opener(urllib.request.OpenerDirector):
    """Opens HTTP and HTTPS only: a redirection must not lead to a local file."""

    def __init__(self) -> None:
        super().__init__()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self.add_handler(handler)


class Response:
    """The answer of a server.

    Args:
        status: 200, or 304 if the file has not changed.
        headers: Its headers; those that are missing are None.
        body: The content, which has not been read yet.
    """

    def __init__(self, status: int, headers: Any, body: Any) -> None:
        self.status, self.headers, self._body = status, headers, body

    def save(self, path: Path) -> None:
        """Write the content to a file."""
        with open(path, "wb") as file:
            shutil.copyfileobj(self._body, file, 1 << 20)

    def read(self, most: int) -> bytes:
        """Return the content.

        Raises:
            RequestError: If it has more than `most` bytes.
            RunError: If it is truncated.
        """
        stated = self.headers["Content-Length"] or ""
        size = int(stated) if stated.isdecimal() else None
        content: bytes = b"" if size is not None and size > most else self._body.read(most + 1)
        if max(size or 0, len(content)) > most:
            raise RequestError(f"larger than {most / 1e6:,.0f} MB")
        if size is not None and len(content) < size:
            raise RunError(f"truncated: received {len(content)} of {size} bytes")
        return content


@contextmanager
def http_get(url: str, name: str, etag: str | None, timeout: float = _TIMEOUT) -> Iterator[Response]:
    """Request a file.

    Args:
        url: Its URL, perhaps with a user and password, which are only sent to its host.
        name: The URL for messages.
        etag: The version that is known; the server answers 304 if it is the current one.
        timeout: Seconds without any data after which the connection is given up.

    Raises:
        RequestError: If the server does not have the file, or does not allow access to it.
        RunError: If it cannot be reached, here or in the block.
    """
    try:
        with _Opener().open(_request(url, etag), timeout=timeout) as body:
            yield Response(body.status, body.headers, body)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 304:
            yield Response(304, error.headers, None)
            return
        what = f"{printable(name)} cannot be downloaded: the server returned {error.code} {printable(error.reason)}"
        if 400 <= error.code < 500 and error.code != 429:
            raise RequestError(what) from None  # the request may contain a password
        raise RunError(f"{what}; retry later") from None
    except (RequestError, RunError):  # of the block; the former is a ValueError
        raise
    except (ValueError, http.client.InvalidURL):
        raise RequestError(f"{printable(name)} is not a valid URL") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        text = one_line(reason) if isinstance(reason, BaseException) else printable(reason)
        raise RunError(f"{printable(name)} cannot be downloaded: {text}; retry later") from None


def _request(url: str, etag: str | None) -> urllib.request.Request:
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    place = urlunsplit((parts.scheme.lower(), host, quote(parts.path, _SAFE), quote(parts.query, _SAFE), ""))
    request = urllib.request.Request(place, headers={"User-Agent": "resnext-hub"})
    if at:
        encoded = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    if etag:
        request.add_header("If-None-Match", etag)
    return request
