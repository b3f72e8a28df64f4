"""`resnext-hub demo --static`: a folder whose page runs the model in the browser, and that becomes a Space."""

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pytest import MonkeyPatch, TempPathFactory, approx, fixture, mark, skip
from support.browser import Tab, chromium
from support.client import Client
from support.demos import NAMES, careful_model, model, photo
from support.loopback_hub import Fault, serve

from resnext_hub.apps.static import FILES
from resnext_hub.apps.web_runtime import runtime_files
from resnext_hub.cli.main import main
from resnext_hub.data.decode import decode
from resnext_hub.errors import RequestError, RunError
from resnext_hub.inference.classifier import load
from resnext_hub.machine import cache_folder

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def page(tmp_path_factory: TempPathFactory) -> tuple[Path, Path]:
    """A model and its page."""
    with MonkeyPatch.context() as patch:
        for name, value in (("fetch_retries", "0"), ("prefer_offline", "true")):
            patch.setenv(f"npm_config_{name}", value)
        try:
            runtime_files(None)
        except (RequestError, RunError) as error:
            skip(str(error))
    root = tmp_path_factory.mktemp("static")
    source = model(root / "pets")
    assert main(["demo", str(source), "--static", str(root / "page"), "--threads", "1"]) == 0
    return source, root / "page"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as any web server does, without special headers."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def answer_for(tab: Tab, content: bytes, name: str = "photo") -> list[tuple[str, float, str]]:
    """Drop an image on the page; return its bars."""
    tab.page.locator("#file:enabled").wait_for(state="attached")
    tab.drop("#drop", name, content)
    tab.page.locator("#status:text-is('')").wait_for(state="attached")
    return tab.bars()


@mark.slow
def test_the_page_answers_as_the_classifier_and_requests_only_its_own_files(page: tuple[Path, Path]) -> None:
    source, folder = page
    classifier = load(source)
    with served(folder) as address, chromium() as browser:
        for scheme, width in (("light", 600), ("dark", 1200)):
            tab = Tab(browser, address, scheme, width)
            for content in (photo(), photo(orientation=6), photo("PNG", side=20), photo("WEBP", side=1200)):
                (expected,) = classifier.predict(content, top=3)
                found = answer_for(tab, content)
                assert [label for label, _, _ in found] == [guess.label for guess in expected.guesses]
                assert [value for _, value, _ in found] == approx(
                    [guess.probability for guess in expected.guesses], abs=0.01
                )
                assert tab.text("#verdict") == expected.guesses[0].label
                assert "s in this browser" in tab.text("#time")
            assert tab.page.title() == "pets"
            assert tab.page.evaluate("document.documentElement.scrollWidth") == width
            assert tab.foreign_requests(address) == []
            assert tab.errors == []


@mark.slow
def test_the_page_tells_what_is_unsure_and_what_is_unlike_the_training_images(
    page: tuple[Path, Path], tmp_path: Path
) -> None:
    assert main(["demo", str(careful_model(tmp_path / "pets")), "--static", str(tmp_path / "page")]) == 0
    with served(tmp_path / "page") as address, chromium() as browser:
        tab = Tab(browser, address)
        for orientation, unsure in ((1, True), (5, False), (1, True)):
            answer_for(tab, photo("PNG", orientation))
            assert (tab.text("#verdict") == "Unsure") == unsure
            assert tab.page.locator("#remark").is_visible() == unsure
            assert tab.page.locator("#warning").is_visible() != unsure
            assert tab.page.locator("#bars .predicted").count() == (0 if unsure else 1)
        assert tab.errors == []


@mark.slow
def test_the_page_can_be_used_with_the_keyboard(page: tuple[Path, Path]) -> None:
    with served(page[1]) as address, chromium() as browser:
        tab = Tab(browser, address)
        tab.page.locator("#file:enabled").wait_for(state="attached")
        tab.page.keyboard.press("Tab")
        tab.page.locator("#file:focus").wait_for(state="attached")
        opened: list[Any] = []
        tab.page.on("filechooser", lambda chooser: opened.append(chooser))  # takes functions only
        for _ in range(60):  # a browser ignores keys until it has drawn the page, which takes long on a busy machine
            tab.page.keyboard.press("Enter")
            tab.page.wait_for_timeout(1000)
            if opened:
                break
        opened[0].set_files({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo()})
        tab.page.locator("#answer li").first.wait_for()
        assert len(tab.bars()) == 3


@mark.slow
def test_files_that_are_no_images_are_refused_in_one_line(page: tuple[Path, Path]) -> None:
    with served(page[1]) as address, chromium() as browser:
        tab = Tab(browser, address)
        tab.page.locator("#file:enabled").wait_for(state="attached")
        for name, content, reason in (
            ("text.jpg", b"text", "it is not an image that this browser can decode"),
            ("empty.png", b"", "it is not an image that this browser can decode"),
            ("line.png", png(Image.new("RGB", (3000, 2))), "one side is more than 1000 times the other"),
        ):
            tab.drop("#drop", name, content)
            tab.page.locator("#status", has_text=reason).wait_for()
            assert tab.text("#status").startswith("This file cannot be classified: ")
            assert tab.page.locator("#answer").is_hidden()
        assert answer_for(tab, photo())
        tab = Tab(browser, (page[1] / "index.html").as_uri())
        assert "browsers do not run models from local files" in tab.text("#status")


@mark.slow
def test_the_page_reads_the_pixels_that_the_package_reads(page: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(page[1], tmp_path / "page"))
    names = ["red", "green", "blue", "first red", "first green", "first blue"]
    write_probe(folder / "model.onnx")
    facts = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(facts | {"label_names": names, "thresholds": [0.5] * 6}))
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (40, 30, 4), np.uint8))
    hidden = Image.fromarray(np.dstack([np.asarray(noise)[..., :3], np.zeros((40, 30), np.uint8)]))
    palette = noise.convert("RGB").quantize(16)
    palette.info["transparency"] = palette.getpixel((0, 0))
    images = {
        "opaque": png(noise.convert("RGB")),
        "transparent": png(noise),
        "hidden colors": png(hidden),
        "palette": png(palette, transparency=palette.getpixel((0, 0))),
        "gray": png(noise.convert("L")),
        "bilevel": png(noise.convert("1")),
        **{f"orientation {number}": photo(orientation=number) for number in range(1, 9)},
    }
    with served(folder) as address, chromium() as browser:
        tab = Tab(browser, address)
        for name, content in images.items():
            pixels = np.asarray(decode({"bytes": content}))
            expected = np.concatenate([pixels.mean(axis=(0, 1)), pixels[0, 0]]) / 255
            found = {label: value for label, value, _ in answer_for(tab, content)}
            tolerance = 0.01 if "orientation" in name else 1e-5  # decoders of JPEG differ by a gray level
            assert [found[label] for label in names] == approx(expected, abs=tolerance), name
            above = [label for label in found if found[label] >= 0.5]
            assert tab.text("#verdict") == (", ".join(above) or "None of the labels")
            assert tab.bars()[0][2].endswith("predicted at 50.0 % or higher")


def write_probe(path: Path) -> None:
    """Write a model that returns the mean of the red, green and blue pixels, and those of the first pixel."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "white"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "axes"], ["means"], keepdims=0),
        helper.make_node("Slice", ["scaled", "zeros", "ones", "axes"], ["corner"]),
        helper.make_node("ReduceMean", ["corner", "axes"], ["first"], keepdims=0),
        helper.make_node("Concat", ["means", "first"], ["probabilities"], axis=1),
    ]
    constants = {
        "white": np.array(255, np.float32),
        "axes": np.array([1, 2]),
        "zeros": np.array([0, 0]),
        "ones": np.array([1, 1]),
    }
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 6])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def empty_page(folder: Path) -> Path:
    """Write files of a page that stand for its content."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * (10_000 if name.endswith((".onnx", ".wasm")) else 1))
    (folder / "labels.json").write_text(json.dumps({"title": "pets *", "label_names": NAMES, "thresholds": None}))
    return folder


def test_a_page_becomes_a_static_space_in_one_verified_commit(tmp_path: Path) -> None:
    folder = empty_page(tmp_path / "page")
    (folder / "notes.txt").write_text("mine")
    with serve() as hub:
        client = Client(hub, tmp_path / "home")
        hub.faults.append(Fault("POST .*/commit/", "lost reply", 1))
        words = ("push", folder, "--space", "me/pets", "--license", "mit")
        code, out, err = client.command(*words)
        assert code == 0, err
        assert f"published and verified: {hub.endpoint}/spaces/me/pets" in out
        space = hub.repos["spaces/me/pets"]
        assert (space.sdk, len(space.commits), set(hub.repos)) == ("static", 2, {"spaces/me/pets"})
        files = space.commits[-1].files
        assert files.keys() == {*FILES, "README.md"}
        assert all(files[name] == (folder / name).read_bytes() for name in FILES)
        _, front, text = files["README.md"].decode().split("---\n")
        assert yaml.safe_load(front) == {
            "title": "pets *",
            "sdk": "static",
            "app_file": "index.html",
            "license": "mit",
            "tags": ["resnext-hub", "image-classification"],
        }
        assert "# pets \\*\n" in text
        code, out, err = client.command(*words)
        assert (code, out) == (0, f"already up to date: {hub.endpoint}/spaces/me/pets\n"), err
        hub.faults.append(Fault("GET /spaces/me/pets/resolve", "wrong bytes", 1))
        (folder / "demo.js").write_text("// changed\n")
        code, _, err = client.command(*words)
        assert code == 1
        assert "the upload differs from the local files" in err
        client.close()


def test_a_wrong_request_to_publish_a_page_is_refused(tmp_path: Path, command: Command) -> None:
    folder = empty_page(tmp_path / "page")
    for words, message in (
        ((folder, "--space", "me/pets"), "--license is required"),
        ((folder, "--space", "pets", "--license", "mit"), "expected owner/name"),
        ((folder, "--space", "me/pets", "--repo-id", "me/pets", "--license", "mit"), "omit one of them"),
        (
            (tmp_path, "--space", "me/pets", "--license", "mit"),
            "is not a demo page: expected a folder written by `resnext-hub demo",
        ),
    ):
        code, out, err = command("push", *words)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    code, out, _ = command("push", folder, "--space", "me/pets", "--license", "mit", "--dry-run")
    assert code == 0
    assert out.startswith("would upload to me/pets in one commit:\n")
    (folder / "labels.json").write_text("{}")
    code, _, err = command("push", folder, "--space", "me/pets", "--license", "mit", "--dry-run")
    assert code == 2
    assert "labels.json is damaged" in err


def test_a_wrong_request_for_a_page_is_refused_before_anything_is_written(
    tmp_path: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    source = model(tmp_path / "pets")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    other = tmp_path / "other.tgz"
    other.write_bytes(b"another package")
    monkeypatch.setenv("PATH", str(tmp_path))  # without npm
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "page"
    for words, message in (
        (("--static", full), "exists but is not a demo page; expected a new folder"),
        (("--static", place), "npm is not installed; run `npm pack onnxruntime-web@"),
        (("--static", place, "--onnxruntime-web", other), "its hash differs; expected the file that `npm pack"),
        (("--static", place, "--onnxruntime-web", tmp_path / "none"), "cannot be read: No such file or directory"),
        (("--static", place, "--port", 80), "--static only writes a folder"),
        (("--onnxruntime-web", other), "--onnxruntime-web needs --static DIR"),
    ):
        code, out, err = command("demo", source, *words)
        assert (code, out) == (2, ""), err
        assert message in err
        assert err.count("\n") == 1
        assert not place.exists()
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_a_damaged_cached_package_is_not_used(tmp_path: Path, command: Command, monkeypatch: MonkeyPatch) -> None:
    source = model(tmp_path / "pets")
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    cache_folder().mkdir()
    (cache_folder() / "onnxruntime-web-1.30.0.tgz").write_bytes(b"cut")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = command("demo", source, "--static", tmp_path / "page")
    assert code == 2
    assert "npm is not installed" in err
