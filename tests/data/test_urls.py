"""The URL of a file is a dataset: downloaded once, the same as the local file, and never published with its secrets."""

import base64
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
from pytest import LogCaptureFixture, MonkeyPatch, fixture, mark, raises
from support.client import Client
from support.layouts import folders, image, parquet, tarred, zipped
from support.loopback_hub import serve
from support.processes import TINY

from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import StreamedImages
from resnext_hub.data.sources.urls import public_name
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, RunError

LOGIN = "Basic " + base64.b64encode(b"me:pass word").decode()


class Server:
    """Files by path, and what has been sent of them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: list[tuple[str, int]] = []
        self.states_versions = True
        self.sends_parts = True
        self.needs_login = False
        self.fault = ""
        self.url = ""
        self.stop: Callable[[], None]

    def statuses(self) -> list[int]:
        """Return the status of each answer since the last call."""
        found = [status for _, status in self.answers]
        self.answers.clear()
        return found


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        state, path = self.server_state, self.path.partition("?")[0]
        content = state.files.get(path)
        etag = f'"{hashlib.sha1(content or b"").hexdigest()}"'
        status = 404 if content is None else 200
        if state.needs_login and self.headers.get("Authorization") != LOGIN:
            status = 401
        if state.fault.isdecimal():
            status = int(state.fault)
        if path.startswith("/moved"):
            status = 302
        if state.states_versions and self.headers.get("If-None-Match") == etag and status == 200:
            status = 304
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if status == 200 and content and wanted and state.sends_parts:
            first, last = int(wanted[1]), int(wanted[2]) + 1
            status, whole, content = 206, len(content), content[first:last]
        state.answers.append((self.path, status))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", path.removeprefix("/moved") if "file" not in path else "file:///etc/passwd")
        if status in (200, 206, 304) and state.states_versions:
            self.send_header("ETag", etag)
        if status in (200, 206):
            self.send_header("Content-Length", str(len(content or b"")))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{whole}")
        self.end_headers()
        if status in (200, 206) and content:
            self.wfile.write(content[: len(content) // 2] if state.fault == "truncated" else content)


@fixture
def server() -> Iterator[Server]:
    state = Server()
    handler = type("Handler", (Handler,), {"server_state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()

        def stop() -> None:
            listening.shutdown()
            listening.server_close()
            thread.join()

        state.stop = stop
        yield state
        stop()


@fixture(autouse=True)
def online(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))


@fixture
def packed(tmp_path: Path, server: Server) -> Path:
    """A zip file of class folders, which the server has as /data/photos.zip."""
    path = zipped(folders)(tmp_path / "a")
    server.files["/data/photos.zip"] = path.read_bytes()
    return path


def load(url: object, **settings: object) -> Splits:
    return load_splits(DataConfig(dataset=str(url), **settings))


def test_a_url_is_the_same_dataset_as_the_local_file(packed: Path, server: Server, caplog: LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    url = f"{server.url}/data/photos.zip"
    found = load(url)
    assert found.fingerprint == load(packed).fingerprint
    assert (found.dataset_id, found.found.dataset, found.hub_id) == (url, url, None)
    assert f"downloading {url} (0.0 MB)" in caplog.text
    assert load_splits(found.found).fingerprint == found.fingerprint


@mark.parametrize("suffix", [".tar", ".tar.gz", ".parquet"])
def test_other_files_are_downloaded_as_well(suffix: str, server: Server, tmp_path: Path) -> None:
    write = parquet("train.parquet") if suffix == ".parquet" else tarred(folders, suffix)
    path = write(tmp_path / "a")
    path = next(path.glob("*.parquet")) if path.is_dir() else path
    server.files[f"/x{suffix}"] = path.read_bytes()
    assert len(load(f"{server.url}/x{suffix}").label_names) == 2


def test_a_table_is_downloaded_and_refers_to_local_images(server: Server, tmp_path: Path) -> None:
    images = sorted(folders(tmp_path / "a").rglob("*.jpg"))
    rows = "".join(f"{path},{path.parent.name}\n" for path in images)
    server.files["/labels.csv"] = f"file,label\n{rows}".encode()
    assert load(f"{server.url}/labels.csv").label_names == ("bus", "car")


def test_a_file_is_downloaded_again_only_if_it_has_changed(packed: Path, server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/data/photos.zip"
    load(url)
    load(url)
    assert server.statuses() == [200, 304]
    server.files["/data/photos.zip"] = zipped(lambda root: folders(root, ("dog", "cat")))(tmp_path / "b").read_bytes()
    assert load(url).label_names == ("cat", "dog")
    assert server.statuses() == [200]
    (copy,) = (tmp_path / "cache/downloads").rglob("content/photos.zip")
    copy.write_bytes(b"truncated")
    assert load(url).label_names == ("cat", "dog")
    assert server.statuses() == [200]


def test_without_a_stated_version_the_same_url_is_downloaded_once(packed: Path, server: Server) -> None:
    server.states_versions = False
    load(f"{server.url}/data/photos.zip")
    server.files["/data/photos.zip"] = server.files["/data/photos.zip"]
    assert load(f"{server.url}/data/photos.zip").label_names == ("bus", "car")


@mark.parametrize("trouble", ["offline", "stopped", "503", "404", "401", "truncated"])
def test_the_copy_in_the_cache_is_used_if_the_server_does_not_deliver_the_file(
    trouble: str, packed: Path, server: Server, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    url = f"{server.url}/data/photos.zip"
    before = load(url).fingerprint
    server.fault = trouble
    server.files["/data/photos.zip"] += b" "  # another version
    if trouble == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if trouble == "stopped":
        server.stop()
    assert load(url).fingerprint == before
    assert ("using the copy in the cache" in caplog.text) == (trouble != "offline")


@mark.parametrize(
    ("fault", "error", "words"),
    [
        ("404", RequestError, "photos.zip cannot be downloaded: the server returned 404 Not Found"),
        ("401", RequestError, "the server returned 401 Unauthorized"),
        ("503", RunError, "the server returned 503 Service Unavailable; retry later"),
        ("truncated", RunError, "was truncated: received"),
    ],
)
def test_a_file_that_cannot_be_downloaded_is_an_error_and_leaves_nothing(
    fault: str, error: type[Exception], words: str, packed: Path, server: Server, tmp_path: Path
) -> None:
    server.fault = fault
    with raises(error) as raised:
        load(f"{server.url}/data/photos.zip?key=hidden")
    assert words in str(raised.value)
    assert "hidden" not in str(raised.value)
    assert not list((tmp_path / "cache/downloads").rglob("*.zip"))


def test_offline_without_a_copy_is_an_error(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises(RunError, match=r"https://host/x\.zip is not in the cache, and HF_HUB_OFFLINE=1 forbids"):
        load("https://host/x.zip")


@mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x.zip", "the scheme ftp:// is not supported; expected one of https://, http://, hf://, s3://"),
        ("file:///tmp/x.zip", "use the path of the file, without file://"),
        ("https://host/download?id=3", "expected a file name that ends in one of .zip .tar"),
        ("https://host/", "is not the URL of a dataset file"),
        ("hf://datasets/owner/name", "use dataset=owner/name"),
        ("s3://bucket/x.zip", "s3:// needs the package s3fs; pip install s3fs"),
        ("http://127.0.0.1:port/x.zip", "is not a valid URL"),
        ("https://[::1/x.zip", "is not a valid URL"),
        ("gs://me:hidden@bucket/x.zip?hidden", "dataset=gs://bucket/x.zip: the scheme gs://"),
    ],
)
def test_a_url_that_cannot_be_downloaded_is_refused_by_name(url: str, words: str) -> None:
    with raises(RequestError) as raised:
        load(url)
    assert words in str(raised.value)
    assert "hidden" not in str(raised.value)


def test_a_redirection_is_followed_but_not_to_a_local_file(packed: Path, server: Server) -> None:
    assert load(f"{server.url}/moved/data/photos.zip").label_names == ("bus", "car")
    with raises((RequestError, RunError), match="cannot be downloaded"):
        load(f"{server.url}/moved/file.zip")


def test_secrets_of_a_url_are_neither_logged_nor_published(packed: Path, server: Server, tmp_path: Path) -> None:
    server.needs_login = True
    url = server.url.replace("://", "://me:pass%20word@") + "/data/photos.zip?signature=AbCd"
    with serve() as hub:
        client = Client(hub, tmp_path / "home")
        try:
            run = (*TINY, "--image-size", 32, "--max-steps", 2, "--output-dir", tmp_path / "run")
            code, out, err = client.command("train", *run, "--dataset", url)
            assert code == 0, err
            # the run is evaluated on the copy in the cache, because its settings lack the password
            code, more_out, more_err = client.command("evaluate", tmp_path / "run")
            assert code == 0, more_err
        finally:
            client.close()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".zip" not in path.name]
    for text in (*(text.encode() for text in (out, err, more_out, more_err)), *written):
        assert b"pass%20word" not in text
        assert b"pass word" not in text
        assert b"AbCd" not in text
    public = f"{server.url}/data/photos.zip"
    assert f'"id": "{public}"' in (tmp_path / "run/record.json").read_text()
    assert f"`{public}`, a downloaded file" in (tmp_path / "run/model/README.md").read_text()


def test_a_file_of_a_dataset_on_the_hub_is_downloaded_and_revalidated(packed: Path, tmp_path: Path) -> None:
    with serve() as hub:
        repo = hub.create("datasets", "me/files")
        repo.commit("data", {"raw/photos.zip": packed.read_bytes()})
        client = Client(hub, tmp_path / "home")
        code = (
            "from huggingface_hub import HfFileSystem\nHfFileSystem.clear_instance_cache()\n"
            "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
            "splits = load_splits(DataConfig(dataset='hf://datasets/me/files/raw/photos.zip'))\n"
            "result = [splits.fingerprint, splits.dataset_id]"
        )
        try:
            answers = [client.run(code) for _ in range(2)]
            assert [answer["result"] for answer in answers] == 2 * [
                [load(packed).fingerprint, "hf://datasets/me/files/raw/photos.zip"]
            ], answers
            assert len([line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]) == 1
            missing = client.command("check", "hf://datasets/me/files/none.zip")
        finally:
            client.close()
    assert missing[0] == 2
    assert "hf://datasets/me/files/none.zip does not exist, or you cannot access it" in missing[2]


@mark.parametrize(
    ("url", "public"),
    [
        ("https://me:pass@host:80/a/b.zip?x=1#y", "https://host:80/a/b.zip"),
        ("HTTPS://me:p@ss@host/a@b.zip", "https://host/a@b.zip"),
        ("hf://datasets/owner/name@main/x.zip", "hf://datasets/owner/name@main/x.zip"),
        ("https://me:pa/ss@host", "https://me:pa/ss@host"),
        ("owner/name", "owner/name"),
        ("./photos?", "./photos?"),
    ],
)
def test_the_public_name_of_a_url_has_no_user_password_or_query(url: str, public: str) -> None:
    assert public_name(url) == public


def stream(server: Server, tmp_path: Path, *names: str) -> str:
    """Serve parquet files of a split each; return the pattern of their addresses."""
    for number, name in enumerate(names):
        labelled = {"label": datasets.ClassLabel(names=["cat", "dog"]), "image": datasets.Image()}
        images = [{"bytes": image(10 * number + i), "path": None} for i in range(4)]
        table = datasets.Dataset.from_dict(
            {"image": images, "label": [0, 1, 0, 1]}, features=datasets.Features(labelled)
        )
        table.to_parquet(tmp_path / "part.parquet", batch_size=2)
        server.files[f"/set/{name}"] = (tmp_path / "part.parquet").read_bytes()
    return f"{server.url}/set/"


FILES = ("train-08.parquet", "train-09.parquet", "train-10.parquet", "test-08.parquet")


def test_parquet_files_at_a_pattern_of_addresses_are_streamed_without_a_copy(server: Server, tmp_path: Path) -> None:
    pattern = stream(server, tmp_path, *FILES) + "{train-{08..10},test-08}.parquet?token=secret"
    server.needs_login = True
    splits = load_splits(DataConfig(dataset=pattern.replace("http://", "http://me:pass%20word@"), streaming=True))
    train = splits.train
    assert isinstance(train, StreamedImages)
    assert (train.count, splits.eval.count) == (12, 4)
    expected = [image(10 * number + i) for number in range(3) for i in range(4)]
    assert [record.row["bytes"] for record in train.records()] == expected
    assert set(server.statuses()) == {206}
    found = splits.found.dataset
    assert found == pattern.removesuffix("?token=secret")
    assert not any((tmp_path / "cache" / "downloads").glob("*"))


def test_a_streamed_file_that_changes_or_vanishes_ends_the_run(server: Server, tmp_path: Path) -> None:
    pattern = stream(server, tmp_path, *FILES) + "{train,test}-08.parquet"
    train = load_splits(DataConfig(dataset=pattern, streaming=True)).train
    assert isinstance(train, StreamedImages)
    server.files["/set/train-08.parquet"] = server.files["/set/train-09.parquet"]
    with raises(RunError, match=r"interrupted in shard 0 \(train-08.parquet has changed\); rerun the same command"):
        list(train.records())
    del server.files["/set/train-08.parquet"]
    with raises(RunError, match=r"interrupted in shard 0 \(the server returned 404 for train-08.parquet\)"):
        list(train.records())
    with raises(RunError, match=r"/set cannot be streamed: the server returned 404 for train-08.parquet"):
        load_splits(DataConfig(dataset=pattern, streaming=True))


def test_addresses_that_cannot_be_streamed_are_refused_by_name(server: Server, tmp_path: Path) -> None:
    pattern = stream(server, tmp_path, *FILES) + "{train,test}-08.parquet"
    for wrong, says in (
        ("{09..08}", r"\{09..08\} is empty"),
        ("{0..999999}", r"\{0..999999\} stands for too many"),
    ):
        with raises(RequestError, match=says):
            load_splits(DataConfig(dataset=pattern.replace("08", wrong), streaming=True))
    server.sends_parts = False
    with raises(RequestError, match=r"the server of (train|test)-08.parquet does not support range requests"):
        load_splits(DataConfig(dataset=pattern, streaming=True))


def test_the_footers_of_streamed_files_are_read_again_only_if_the_files_change(server: Server, tmp_path: Path) -> None:
    pattern = stream(server, tmp_path, *FILES) + "{train,test}-08.parquet"
    config = DataConfig(dataset=pattern, streaming=True)
    before = load_splits(config)
    server.answers.clear()
    assert load_splits(config).fingerprint == before.fingerprint
    assert len(server.answers) == 2  # the version of each file
    server.files["/set/train-08.parquet"] = server.files["/set/train-09.parquet"]
    assert load_splits(config).fingerprint != before.fingerprint
    server.answers.clear()
    server.states_versions = False  # then the footers are the only way to know
    load_splits(config)
    assert len(server.answers) > 4
