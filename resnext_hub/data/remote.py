"""Images on the web, downloaded into memory with limits on size and time."""

import queue
import re
import threading
from dataclasses import dataclass

from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.data.sources.http import http_get
from resnext_hub.data.sources.urls import public_name
from resnext_hub.errors import RequestError, RunError
from resnext_hub.text import printable

MAX_BYTES = 1 << 26
"""Largest image that is downloaded, in bytes."""

SECONDS = 30.0
"""Time that a download may take in total."""


@dataclass(frozen=True)
class RemoteImage:
    """An image at an HTTP or HTTPS URL; a classifier accepts it like a path, and downloads the image when it is needed.

        classifier.predict(resnext_hub.RemoteImage("https://example.com/cat.jpg"))

    Redirects are followed only to HTTP and HTTPS URLs. `str(image)` is the URL without user name, password and query.
    """

    url: str
    seconds: float = SECONDS
    """Maximum time of the whole download."""
    max_bytes: int = MAX_BYTES
    """Maximum size of the file."""

    def __str__(self) -> str:
        return public_name(self.url)

    def read(self) -> bytes:
        """Download the encoded image.

        Raises:
            UnreadableImageError: If it cannot be downloaded within the limits; the message is the reason.
        """
        results: queue.SimpleQueue[bytes | str] = queue.SimpleQueue()
        # a server can stretch any single operation, so the time limit is that of a thread, which is then left behind
        threading.Thread(target=lambda: results.put(self._download()), daemon=True).start()
        try:
            content = results.get(timeout=self.seconds)
        except queue.Empty:
            content = f"not received within {self.seconds:g} s"
        if isinstance(content, str):
            raise UnreadableImageError(f"cannot be downloaded: {content}")
        return content

    def _download(self) -> bytes | str:
        """Return the content, or why it cannot be downloaded."""
        name = str(self)
        try:
            with http_get(self.url, name, None, timeout=self.seconds) as response:
                return response.read(self.max_bytes)
        except (RequestError, RunError) as error:
            return str(error).removeprefix(f"{printable(name)} ").removeprefix("cannot be downloaded: ")


def is_remote(text: str) -> bool:
    """Return whether text is an HTTP or HTTPS address."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None
