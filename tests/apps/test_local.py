"""`resnext-hub demo`: the page of this machine answers as the classifier, and neither of them asks another server."""

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from pytest import MonkeyPatch, TempPathFactory, fixture, mark, raises, skip
from support.browser import Tab, chromium
from support.demos import careful_model, model, photo
from support.processes import ROOT

from resnext_hub.apps.answer import answer
from resnext_hub.apps.templates import render
from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.inference.classifier import load

Command = Callable[..., tuple[int, str, str]]

WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto"):
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[-1]
        host = host[0] if isinstance(host, tuple) else host
        if host not in (None, "127.0.0.1", "localhost", "::1"):
            print("request to", host, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from resnext_hub.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command, and reports each connection to another machine."""


@fixture(scope="module")
def plain(tmp_path_factory: TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("plain") / "pets")


@fixture(scope="module")
def several(tmp_path_factory: TempPathFactory) -> Path:
    thresholds = {"thresholds": [0.2, 0.99, 0.5]}
    folder = tmp_path_factory.mktemp("several") / "scenes"
    return model(folder, problem_type="multi_label_classification", resnext_hub=thresholds)


@contextmanager
def demo(*words: object, scratch: Path, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command; yield the address that it prints, and its process."""
    if find_spec("gradio") is None:
        skip("gradio is not installed")
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED, "demo", *map(str, words), "--threads", "1"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(scratch)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("demo: http://127.0.0.1:"), process.communicate()
            yield line.split()[1], process
        finally:
            process.kill()


DROP = "button:has(input[type=file])"
"""Where a file is dropped."""


@mark.slow
def test_the_page_answers_as_the_classifier_and_asks_no_other_server(plain: Path, tmp_path: Path) -> None:
    unreachable = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    with demo(plain, scratch=tmp_path, **unreachable) as (address, process), chromium() as browser:
        for scheme, width in (("light", 600), ("dark", 1200)):
            tab = Tab(browser, address, scheme, width)
            for number, orientation in enumerate((1, 6)):
                tab.drop(DROP, "photo.jpg", photo(orientation=orientation))
                expected = load(plain).predict(photo(orientation=orientation), top=3)[0].guesses
                tab.page.locator(f"[aria-valuenow='{expected[0].probability}']").wait_for()
                assert [(label, value) for label, value, _ in tab.bars()] == [
                    (guess.label, guess.probability) for guess in expected
                ]
                assert tab.text(".answer:has(ol) .verdict") == expected[0].label
                assert tab.page.locator(".answer figure img").count() == 2, number  # the image, and the heat map
            assert tab.page.title() == "pets"
            assert tab.page.evaluate("document.documentElement.scrollWidth") == width
            assert tab.foreign_requests(address) == []
            assert tab.errors == []
        assert not [path for path in tmp_path.rglob("*") if path.suffix == ".jpg"]  # the uploads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (130, "", "stopped\n")
        assert not list(tmp_path.glob("resnext-hub-demo-*"))


@mark.slow
def test_files_that_are_no_images_are_refused_in_one_line_and_the_next_image_is_classified(
    plain: Path, tmp_path: Path
) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    refused = {
        "text.jpg": (b"text", "not an image"),
        "empty.png": (b"", "zero bytes"),
        "cut.jpg": (photo(side=600)[:2000], "truncated"),
        "bomb.png": (bomb.getvalue(), "more than 100000000 pixels"),
        "line.png": (photo("PNG")[:33], ""),
        "script.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not an image"),
        "<img src=x>.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    with demo(plain, scratch=tmp_path) as (address, process), chromium() as browser:
        tab = Tab(browser, address)
        for name, (content, reason) in refused.items():
            tab.drop(DROP, name, photo())
            tab.page.locator(".answer figure").first.wait_for()
            tab.drop(DROP, name, content)
            tab.page.locator(".refused").wait_for()
            text = tab.text(".refused")
            assert text.startswith("This file cannot be classified: "), name
            assert reason in text
            assert "\n" not in text
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (143, "", "stopped\n")


@mark.slow
def test_the_page_of_a_model_with_several_labels_shows_all_with_their_thresholds(several: Path, tmp_path: Path) -> None:
    with demo(several, scratch=tmp_path) as (address, _), chromium() as browser:
        tab = Tab(browser, address)
        tab.drop(DROP, "photo.jpg", photo())
        tab.page.locator(".answer figure").first.wait_for()
        (all_of_them,) = load(several).predict(photo(), top=3)
        (predicted,) = load(several).predict(photo())
        assert [bar[:2] for bar in tab.bars()] == [(g.label, g.probability) for g in all_of_them.guesses]
        assert {text.partition(", ")[2] for _, _, text in tab.bars()} == {
            f"predicted at {limit} % or higher" for limit in ("20.0", "99.0", "50.0")
        }
        assert tab.text(".answer:has(ol) .verdict") == ", ".join(guess.label for guess in predicted.guesses)
        assert tab.errors == []


@mark.slow
def test_an_address_that_cannot_be_listened_on_is_refused_in_one_line(plain: Path, command: Command) -> None:
    if find_spec("gradio") is None:
        skip("gradio is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            (("--port", port), f"--host 127.0.0.1 --port {port}: Address already in use; expected"),
            (
                ("--host", "192.0.2.1"),
                "--host 192.0.2.1 --port 7860 to 7959: Cannot assign requested address",
            ),
            (("--host", "no such host"), "--host no such host --port 7860 to 7959: "),
        ):
            code, out, err = command("demo", plain, *words)
            assert (code, out) == (2, "")
            assert err.startswith(f"error: {message}")
            assert err.count("\n") == 1


def test_an_answer_is_that_of_the_classifier_with_the_image_upright(plain: Path, several: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(orientation=6))
    for folder in (plain, several):
        classifier = load(folder)
        found = answer(classifier, path, heat_map=True)
        (expected,) = classifier.predict(path, top=3)
        assert [(bar.label, bar.probability) for bar in found.bars] == [
            (guess.label, guess.probability) for guess in expected.guesses
        ]
        (predicted,) = classifier.predict(path)
        assert [bar.label for bar in found.predicted] == [guess.label for guess in predicted.guesses]
        assert found.preview.height > found.preview.width
        assert found.heat_map.size == (256, 256)
    path.write_bytes(b"text")
    with raises(UnreadableImageError, match="not an image"):
        answer(load(plain), path, heat_map=False)


def test_an_answer_tells_what_is_unsure_and_what_is_unlike_the_training_images(tmp_path: Path) -> None:
    classifier, path = load(careful_model(tmp_path / "model")), tmp_path / "photo.png"
    for orientation, unsure in ((1, True), (5, False)):
        path.write_bytes(photo("PNG", orientation))
        found = answer(classifier, path, heat_map=False)
        assert (found.unsure, found.unlike) == (unsure, not unsure)
        html = render("answer.html.jinja", answer=found)
        assert ("<b>Unsure</b>" in html) == unsure
        assert ("This image is unlike the training images" in html) != unsure
        assert html.count('class="predicted"') == (0 if unsure else 1)


def test_the_answer_escapes_the_names_of_classes(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(photo("PNG"))
    html = render("answer.html.jinja", answer=answer(load(plain), path, heat_map=False))
    assert "<img src=x" not in html
    assert "猫 &amp; {{ 7 * 7 }}" in html
    assert html.count('role="meter"') == 3


def test_a_missing_gradio_is_named_with_its_extra(plain: Path, command: Command, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command("demo", plain) == (
        2,
        "",
        'error: gradio is not installed; pip install "resnext-hub[demo]"\n',
    )
