"""Fonts for class names in any script, and names as matplotlib can draw them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from resnext_hub.text import plot_text, printable

_logger = logging.getLogger(__name__)

DEFAULT_FONT = "DejaVu Sans"
"""The font that matplotlib ships."""

_INVISIBLE = "\u200c\u200d\ufe0e\ufe0f"
"""Joiners and variation selectors, which are dropped where no font has them."""


@dataclass(frozen=True)
class Lettering:
    """The installed fonts that draw a set of class names."""

    families: tuple[str, ...]
    characters: frozenset[int]
    """Code points that at least one of the families covers."""

    def name(self, names: Sequence[str], index: int, width: int) -> str:
        """Return a class name as matplotlib draws it, cut to `width` characters.

        Characters that no font covers are escaped, and such names are prefixed with the index of the class.
        """
        name = printable(names[index])
        drawn = "".join(c if ord(c) in self.characters else _escaped(c) for c in name)
        drawn = drawn if drawn == name else f"{index}: {drawn}"
        return plot_text(drawn if len(drawn) <= width else f"{drawn[: width - 1]}…")

    def note(self, names: Sequence[str]) -> str:
        """Return a remark for the plot if some names had to be escaped, else an empty string."""
        covered = all(ord(c) in self.characters for name in names for c in printable(name))
        return (
            ""
            if covered
            else "; names with characters that no installed font has are escaped and start with the class index"
        )


@lru_cache(maxsize=1)
def choose_lettering(names: tuple[str, ...]) -> Lettering:
    """Return installed fonts that cover the characters of the names, and log the characters that none covers."""
    from matplotlib.font_manager import findfont, fontManager

    families, characters = [DEFAULT_FONT], set(_characters(findfont(DEFAULT_FONT)))
    missing = {ord(c) for name in names for c in printable(name)} - characters
    for font in fontManager.ttflist if missing else ():
        if font.name.startswith(("Last Resort", "STIX", "cm", "DejaVu")) or font.name in families:
            continue
        more = _characters(font.fname)
        if more & missing:
            families.append(font.name)
            characters |= more
            missing -= more
    missing -= set(map(ord, _INVISIBLE))
    if missing:
        _logger.warning(
            "no installed font has %s (%d characters in class names), so plots show escape sequences; install a font "
            "package such as fonts-noto-cjk",
            "".join(map(chr, sorted(missing)[:8])),
            len(missing),
        )
    return Lettering(tuple(families), frozenset(characters))


@lru_cache(maxsize=4096)
def _characters(font: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # the font file was removed or is damaged
        return frozenset()


def _escaped(character: str) -> str:
    return "" if character in _INVISIBLE else character.encode("unicode_escape").decode()
