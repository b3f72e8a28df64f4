"""Text that comes from data (names of files, classes and datasets), escaped for the place where it is shown.

Every such name passes one of these functions before it leaves the program: `printable` for terminals, logs and errors,
the others for Markdown, HTML, plots and Python.
"""

import html
import re
import unicodedata
from collections.abc import Iterable

_JOINERS = "\u200c\u200d"
"""Format characters that Persian, Indic scripts and emoji need; they cannot move text on the screen."""


def printable(text: object) -> str:
    """Return text with control characters, bidirectional overrides and undecodable bytes as escapes, in one line.

    A byte of a file name that is not UTF-8 becomes `\\xff`, a newline `\\n`, an escape character `\\x1b`.
    """
    return "".join(_escaped(character) if _is_unsafe(character) else character for character in str(text))


def markdown(text: object) -> str:
    """Return text that Markdown renders literally: no emphasis, link, image, HTML, table cell or mathematics."""
    escaped = html.escape(printable(text), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", escaped)
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")  # which would become links


def code_span(text: object) -> str:
    """Return text as inline code in Markdown, outside tables; backticks in the text do not end it."""
    safe = printable(text)
    fence = "`" * (max((len(run) for run in re.findall(r"`+", safe)), default=0) + 1)
    pad = " " if safe.startswith("`") or safe.endswith("`") or not safe.strip() else ""
    return f"{fence}{pad}{safe}{pad}{fence}"


def plot_text(text: object) -> str:
    """Return text that matplotlib draws literally; between two dollar signs it would parse mathematics."""
    return printable(text).replace("$", r"\$")


def python_string(text: str) -> str:
    """Return a printable Python string literal, in double quotes, for text."""
    return '"' + "".join(f"\\{char}" if char in '"\\' else _for_python(char) for char in text) + '"'


def listing(names: Iterable[object], most: int = 12) -> str:
    """Return at most `most` names in one printable line, and how many more there are."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def slug(text: str) -> str:
    """Return text as a name of a file or project, of letters, digits, underscores, dots and hyphens."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "run"


def is_printable(text: str) -> bool:
    """Return whether text has none of the characters that `printable` escapes."""
    return not any(map(_is_unsafe, text))


def _is_unsafe(character: str) -> bool:
    category = unicodedata.category(character)
    if category == "Cn":  # unassigned in this Python, but perhaps a letter in a later one; noncharacters never are
        return 0xFDD0 <= ord(character) <= 0xFDEF or ord(character) & 0xFFFE == 0xFFFE
    return (category[0] == "C" and character not in _JOINERS) or category in ("Zl", "Zp")


def _for_python(character: str) -> str:
    return character.encode("unicode_escape").decode() if _is_unsafe(character) else character


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte of a file name that it cannot decode
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
