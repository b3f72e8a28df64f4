"""Count the work of functions, for tests of what it grows with: unlike times, counts are the same on every machine."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import numpy as np


def calls_of(work: Callable[[], object]) -> int:
    """Count the Python functions that are entered, and the generators that are resumed."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


class CountedArray(np.ndarray):
    """An array that counts the elements that arithmetic and comparisons with it, and with parts of it, take in."""

    elements = 0

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Return the values as such an array, and start counting."""
        cls.elements = 0
        return values.view(cls)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **settings: Any) -> Any:
        """Count the elements, and compute."""
        plain = [np.asarray(value) if isinstance(value, CountedArray) else value for value in inputs]
        CountedArray.elements += max(np.size(value) for value in plain)
        return getattr(ufunc, method)(*plain, **settings)
