"""The numbers of a run, a JSON object a line."""

import json
from pathlib import Path
from typing import Any

from resnext_hub.files import write_atomic


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Give the complete lines of a file; a line that a killed process left half written is none."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class LineLog:
    """Appends lines to a file that a resumed run continues.

    Args:
        path: The file.
        step: Step of the checkpoint that the run goes on from; lines of later steps go.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, **values: Any) -> None:
        """Append a line; it is with the operating system when this returns."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> "LineLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
