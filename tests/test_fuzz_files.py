"""Mutated files are read as they say or refused in a line; `tests/fuzz.py` is the long form."""

import fuzz
from pytest import mark


@mark.parametrize("name", list(fuzz.TARGETS))
def test_a_mutated_file_is_read_as_it_says_or_refused_in_a_line(name: str) -> None:
    counts = fuzz.fuzz(name, examples=60)
    assert sum(counts.values()) >= 30
