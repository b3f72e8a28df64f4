"""A reader sees the old file or the new one."""

from pathlib import Path

from pytest import raises

from resnext_hub.files import write_atomic


def test_a_write_that_the_system_refuses_leaves_nothing_beside_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with raises(OSError, match="name"):
        write_atomic(tmp_path / "name", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
