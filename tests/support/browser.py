"""Pages in the Chromium of the system, with what they requested and what failed in them."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest import importorskip, skip

CHROMIUM = "/usr/bin/chromium"

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

SECONDS = 60
"""Most time that anything on a page may take."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser; skip the test if it or its driver is not installed."""
    playwright = importorskip("playwright.sync_api")
    if not Path(CHROMIUM).is_file():
        skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page that was opened, with the addresses that it requested and the errors of its scripts."""

    def __init__(self, browser: Any, address: str, scheme: str = "light", width: int = 600) -> None:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        context.set_default_timeout(1000 * SECONDS)
        self.requests: list[str] = []
        self.errors: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("requestfailed", lambda request: self._failed(request.url, request.failure))
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self._logged(line.type, line.text))
        self.page.goto(address)

    def _failed(self, address: str, reason: str | None) -> None:
        """Forget a request that the content security policy of the page blocked: it was never sent."""
        if reason == "csp":
            self.requests.remove(address)

    def _logged(self, kind: str, text: str) -> None:
        if kind == "error" and "violates the following Content Security Policy" not in text:
            self.errors.append(text)

    def drop(self, target: str, name: str, content: bytes) -> None:
        """Drop a file on an element."""
        code = """([name, content]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
            return data;
        }"""
        data = self.page.evaluate_handle(code, [name, base64.b64encode(content).decode()])
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event(target, event, {"dataTransfer": data})

    def bars(self) -> list[tuple[str, float, str]]:
        """Return the label, probability and description of each bar, in order."""
        found = self.page.locator(".answer [role=meter]").all()
        names = ("aria-label", "aria-valuenow", "aria-valuetext")
        rows = [[meter.get_attribute(name) for name in names] for meter in found]
        return [(label, float(value), text) for label, value, text in rows]

    def text(self, selector: str) -> str:
        """Return the text of the first such element, once it is there."""
        return str(self.page.locator(selector).first.inner_text())

    def foreign_requests(self, address: str) -> list[str]:
        """Return the requests to anything but a server."""
        return [url for url in self.requests if not url.startswith((address, "data:", f"blob:{address}"))]
