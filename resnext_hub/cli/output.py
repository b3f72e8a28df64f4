"""Standard output of the commands: only the process that speaks for the run prints."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from resnext_hub.errors import RunError
from resnext_hub.processes.launcher import speaks_for_run
from resnext_hub.text import printable


def write(text: str) -> None:
    """Write text to standard output; control characters in it are escaped, except tabs and newlines.

    Raises:
        BrokenPipeError: If the reader has closed its end, as `head` does.
        RunError: If it cannot be written otherwise.
    """
    if not speaks_for_run():
        return
    try:
        lines = ["\t".join(map(printable, line.split("\t"))) for line in text.split("\n")]
        encoding = sys.stdout.encoding or "utf-8"  # it may lack characters of a name
        sys.stdout.write("\n".join(lines).encode(encoding, errors="backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise RunError(f"cannot write to standard output: {error.strerror or error}") from error


def discard_output() -> None:
    """Redirect standard output to nowhere, so that the process can end without writing the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def json_line(content: dict[str, Any]) -> str:
    """Return JSON in one line of printable ASCII."""
    return json.dumps(content).replace("\x7f", "\\u007f") + "\n"
