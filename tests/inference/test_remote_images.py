"""`predict` downloads images by their address; one that cannot be downloaded is reported like an unreadable file."""

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from pytest import MonkeyPatch, fixture, mark, param, raises

import resnext_hub
from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.data.remote import MAX_BYTES, RemoteImage

Command = Callable[..., tuple[int, str, str]]


def encoded(shade: int = 60) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 48), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the name in the path."""

    protocol_version = "HTTP/1.1"
    released = threading.Event()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        getattr(self, f"send_{name.partition('.')[0].replace('-', '_')}", self.send_missing)()

    def answer(self, content: bytes, status: int = 200, size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def send_good(self) -> None:
        self.answer(encoded())

    def send_page(self) -> None:
        self.answer(b"<html>no image</html>")

    def send_missing(self) -> None:
        self.answer(b"", 404)

    def send_moved(self) -> None:
        self.answer(b"", 302, Location="/good.png")

    def send_to_file(self) -> None:
        self.answer(b"", 302, Location="file:///etc/hostname")

    def send_stated_large(self) -> None:
        self.answer(b"", size=MAX_BYTES + 1)
        self.close_connection = True

    def send_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.released.is_set():
            self.wfile.write(b"x" * 65536)

    def send_short(self) -> None:
        self.answer(b"half", size=8)
        self.close_connection = True

    def send_silent(self) -> None:
        self.released.wait(30)
        self.close_connection = True

    def send_slow(self) -> None:
        """Send a byte now and then, so that no single operation takes long."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.close_connection = True
        while not self.released.wait(0.1):
            self.wfile.write(b"x")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""


@fixture
def url() -> Iterator[str]:
    Handler.released.clear()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Handler.released.set()
    server.shutdown()
    server.server_close()


def test_an_address_is_classified_like_its_file(vehicles_run: Path, url: str, tmp_path: Path, command: Command) -> None:
    (tmp_path / "good.png").write_bytes(encoded())
    addresses = (f"{url}/good.png", f"{url.replace('http', 'HTTP')}/moved.png")
    code, out, err = command("predict", vehicles_run, addresses[0], tmp_path, addresses[1], "--json", "--threads", 1)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [addresses[0], str(tmp_path / "good.png"), f"{url}/moved.png"]
    assert lines[0]["predictions"] == lines[1]["predictions"] == lines[2]["predictions"]
    classifier = resnext_hub.load(vehicles_run)
    (prediction,) = classifier.predict(resnext_hub.RemoteImage(addresses[0]))
    assert prediction.guesses[0].label == lines[0]["predictions"][0]["label"]


def test_one_that_cannot_be_downloaded_is_reported_and_the_others_are_classified(
    vehicles_run: Path, url: str, command: Command
) -> None:
    names = ("missing.jpg", "good.png", "page.png")
    code, out, err = command("predict", vehicles_run, *(f"{url}/{name}" for name in names), "--threads", 1)
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [f"{url}/good.png"]
    assert err.splitlines() == [
        f"{url}/missing.jpg: cannot be downloaded: the server returned 404 Not Found",
        f"{url}/page.png: not an image",
        "error: 2 of 3 images could not be decoded",
    ]


@mark.parametrize(
    ("name", "reason"),
    [
        param("missing.jpg", "the server returned 404 Not Found", id="missing"),
        param("to-file.png", "Redirection to url 'file:///etc/hostname' is not allowed", id="redirected to a file"),
        param("stated-large.png", "larger than 67 MB", id="too large by its header"),
        param("short.png", "truncated: received 4 of 8 bytes", id="truncated"),
    ],
)
def test_each_failure_has_a_reason(url: str, name: str, reason: str) -> None:
    with raises(UnreadableImageError) as failure:
        RemoteImage(f"{url}/{name}").read()
    assert str(failure.value).startswith("cannot be downloaded: ")
    assert reason in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_server_that_sends_too_much_or_too_slowly_is_given_up(url: str) -> None:
    with raises(UnreadableImageError, match="cannot be downloaded: larger than 1 MB"):
        RemoteImage(f"{url}/endless.png", max_bytes=1_000_000).read()
    for name in ("silent.png", "slow.png"):
        begin = time.monotonic()
        with raises(UnreadableImageError, match=r"^cannot be downloaded: (not received within 0\.5 s|timed out)"):
            RemoteImage(f"{url}/{name}", seconds=0.5).read()
        assert time.monotonic() - begin < 5


def test_the_time_limit_is_a_flag(vehicles_run: Path, url: str, command: Command) -> None:
    code, out, err = command("predict", vehicles_run, f"{url}/slow.png", "--timeout", 0.5, "--threads", 1)
    assert (code, out) == (1, "")
    assert f"{url}/slow.png: cannot be downloaded: not received within 0.5 s" in err
    assert "error: 0 of 1 images could be decoded" in err
    code, _, err = command("predict", vehicles_run, f"{url}/slow.png", "--timeout", 0)
    assert code == 2
    assert "--timeout" in err


def test_addresses_can_come_from_standard_input_and_their_secrets_are_not_printed(
    vehicles_run: Path, url: str, command: Command, monkeypatch: MonkeyPatch
) -> None:
    secret = url.replace("http://", "http://me:password@")
    lines = f"{secret}/good.png?signature=abc\n{secret}/missing.png?signature=abc\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines.encode())))
    code, out, err = command("predict", vehicles_run, "-", "--csv", "--threads", 1)
    assert code == 1
    assert f"{url}/good.png" in out
    assert f"{url}/missing.png: cannot be downloaded" in err
    assert "password" not in out + err
    assert "signature" not in out + err


def test_nobody_listens(command: Command, vehicles_run: Path) -> None:
    code, out, err = command("predict", vehicles_run, "http://127.0.0.1:9/cat.jpg", "--threads", 1)
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == (
        "http://127.0.0.1:9/cat.jpg: cannot be downloaded: [Errno 111] Connection refused; retry later"
    )
