"""A reader sees the old file or the new one."""

import os
import socket
from pathlib import Path

from pytest import MonkeyPatch, mark, raises

from resnext_hub.errors import RequestError
from resnext_hub.files import FileTooLargeError, new_files, read_json, read_regular, write_atomic


def test_a_write_that_the_system_refuses_leaves_nothing_beside_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with raises(OSError, match="name"):
        write_atomic(tmp_path / "name", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_of_several_files_the_last_is_never_seen_among_those_of_another_time(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    weights, network = tmp_path / "model.bin", tmp_path / "model.xml"

    def write(content: str) -> None:
        with new_files(weights, network) as aside:
            for path in (weights, network):
                (aside / path.name).write_text(content)

    write("old")
    replace, left = os.replace, []

    def die_at_the_second(source: Path, target: Path) -> None:
        left.append(target)
        if len(left) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_at_the_second)
        with raises(KeyboardInterrupt):
            write("new")
    assert weights.read_text() == "new"
    assert not network.exists()  # so that nobody takes the old one for the new one's
    write("newest")
    assert (weights.read_text(), network.read_text()) == ("newest", "newest")
    assert sorted(tmp_path.iterdir()) == [weights, network]


def test_of_several_files_the_old_ones_stay_if_writing_fails(tmp_path: Path) -> None:
    paths = tmp_path / "model.bin", tmp_path / "model.xml"
    for path in paths:
        path.write_text("old")
    with raises(OSError, match="no-folder"), new_files(*paths) as aside:
        (aside / "no-folder" / "model.bin").write_text("new")
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == list(paths)


@mark.parametrize("kind", ["fifo", "folder", "socket", "device", "link to a device", "dangling link", "loop of links"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to({"link to a device": "/dev/zero", "dangling link": "gone", "loop of links": "x.jpg"}[kind])
    with raises(OSError, match=r"not a regular file but a|No such file|Too many levels"):
        read_regular(path)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", limit=5) == b"12345"
    with raises(FileTooLargeError):
        read_regular(tmp_path / "a", limit=4)


@mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", b'{"a": "x"}', b"\xff\xfe", b"[" * 200_000, b'{"a": NaN}', b"{}{}"]
)
def test_damaged_json_is_refused_by_the_name_of_its_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with raises(RequestError, match=r"state.json is damaged .*; remove it$") as caught:
        read_json(path, dict[str, int], "remove it")
    assert "\n" not in str(caught.value)
