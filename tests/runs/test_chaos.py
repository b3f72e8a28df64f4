"""Whatever is killed, and however often, the same command ends with the same bits. The long form is chaos.py."""

from pathlib import Path

from chaos import torment
from pytest import mark


@mark.parametrize(("processes", "kills"), [(1, 2), (3, 1)])
def test_a_run_that_is_killed_at_random_ends_as_one_that_is_left_alone(
    tmp_path: Path, processes: int, kills: int
) -> None:
    done, different = torment(tmp_path, processes, kills, steps=40, seed=processes)
    assert len(done) == kills
    assert different == []
