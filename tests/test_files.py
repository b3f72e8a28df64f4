"""A reader sees the old file or the new one."""

import os
from pathlib import Path

from pytest import MonkeyPatch, raises

from resnext_hub.files import new_files, write_atomic


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
