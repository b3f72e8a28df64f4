"""A run that is killed at random and rerun ends with identical results; `tests/chaos.py` is the long form."""

from pathlib import Path

from chaos import torment
from pytest import mark, param


@mark.parametrize(("processes", "kills"), [(1, 2), param(3, 1, marks=mark.slow)])
def test_a_run_killed_at_random_ends_like_an_uninterrupted_one(tmp_path: Path, processes: int, kills: int) -> None:
    done, different = torment(tmp_path, processes, kills, steps=40, seed=processes)
    assert len(done) == kills
    assert different == []
