"""Check augmentation policies in timm's notation, because timm ignores or clips the parts that it does not know."""

import re

from resnext_hub.errors import RequestError, setting
from resnext_hub.settings import Range, shown

_STD = Range(0, 1000)  # above 100, timm draws uniformly: mstd101 is TrivialAugment
_FLAG = Range(0, 1)
_WHOLE = {"m", "n", "mmax", "inc", "w", "d", "b"}

_PARTS: dict[str, dict[str, Range]] = {
    "rand": {
        "m": Range(0, 10),  # or mmax, if that is greater
        "n": Range(1, 16),
        "p": Range(0, 1, above=True),
        "mstd": _STD,
        "mmax": Range(1, 100),
        "inc": _FLAG,
    },
    "augmix": {
        "m": Range(0, 10),
        "w": Range(1, 16),
        "d": Range(1, 16),
        "a": Range(0, 100, above=True),
        "b": _FLAG,
        "mstd": _STD,
    },
    **{name: {"mstd": _STD} for name in ("3a", "v0", "v0r", "original", "originalr")},
}
"""Parameters of each policy, which follow its name after dashes, each at most once: a key and a number."""

_RAND_CHOICES = ("tweights", "t3a", "t3aw")
"""Sets of operations that `rand` can draw from."""


def check_policy(policy: str) -> None:
    """Raise a RequestError that names the wrong part if timm would not apply all of a policy."""
    name, *parts = policy.split("-")
    if name not in _PARTS:
        raise RequestError(
            f"{setting('auto_augment', shown(policy))}: {shown(name) or 'an empty name'} is not a policy; expected one "
            f"of {', '.join(_PARTS)}, such as rand-m7-mstd0.5, augmix-m3 or 3a"
        )
    allowed = _PARTS[name]
    values: dict[str, float] = {}
    for part in parts:
        key, number = _split(part)
        is_choice = name == "rand" and part in _RAND_CHOICES
        if (key not in allowed or number is None) and not is_choice:
            raise _wrong(policy, part, f"expected {_listed(name)}")
        if (key := "t" if is_choice else key) in values:
            raise _wrong(policy, part, f"{key} is given twice")
        values[key] = number or 0.0
    for key, value in values.items():
        bounds = allowed.get(key)
        if key == "m" and "mmax" in values:
            bounds = Range(0, int(max(values["mmax"], 10)))
        if bounds and (value not in bounds or (key in _WHOLE and not value.is_integer())):
            whole = "a whole number " if key in _WHOLE else "a number "
            raise _wrong(policy, f"{key}{value:g}", f"expected {whole}{bounds}")


def _split(part: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"([a-z]+)([0-9]{1,3}(?:\.[0-9]{1,6})?)", part, re.ASCII)
    return (match[1], float(match[2])) if match else (part, None)


def _listed(name: str) -> str:
    words = [f"{key}N" for key in _PARTS[name]] + (list(_RAND_CHOICES) if name == "rand" else [])
    return f"{', '.join(words)} after {name}-"


def _wrong(policy: str, part: str, expected: str) -> RequestError:
    examples = "valid policies are, for example, rand-m7-mstd0.5, augmix-m3 and 3a"
    return RequestError(
        f"{setting('auto_augment', shown(policy))}: {shown(part) or 'an empty part'}: {expected}; {examples}"
    )
