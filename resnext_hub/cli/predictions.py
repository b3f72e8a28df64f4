"""Ways to write predictions: text for people and pipes, JSON, CSV or a parquet file."""

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from resnext_hub.cli.output import json_line, write
from resnext_hub.files import write_atomic
from resnext_hub.inference.prediction import Prediction, Unread
from resnext_hub.text import printable

UNSURE = "\tunsure"
"""Last column of the line of an unsure answer."""

BAR = 20
"""Characters of the bar of a probability of 1."""


class Writer(Protocol):
    """Writes the result for each image."""

    def add(self, path: str, result: Prediction | Unread) -> None:
        """Write the result for an image."""

    def close(self) -> None:
        """Write what was kept until the end."""


class TextLines:
    """A line per image: the path, each class with its probability, and unsure if it is, separated by tabs."""

    def add(self, path: str, result: Prediction | Unread) -> None:
        """Write a line; an unreadable image has none."""
        if isinstance(result, Prediction):
            # escaped, a tab or newline in a name cannot break the columns
            columns = (f"\t{printable(guess.label)}\t{guess.probability:.4f}" for guess in result.guesses)
            write(f"{printable(path)}{''.join(columns)}{UNSURE if result.unsure else ''}\n")

    def close(self) -> None:
        """Write nothing."""


class Table:
    """Lines for a terminal: the path, and below it a bar for each class."""

    def add(self, path: str, result: Prediction | Unread) -> None:
        """Write the lines of an image; an unreadable one has none."""
        if isinstance(result, Unread):
            return
        lines = [printable(path)]
        width = max((len(printable(guess.label)) for guess in result.guesses), default=0)
        for guess in result.guesses:
            filled = round(BAR * guess.probability)
            bar = "█" * filled + "·" * (BAR - filled)
            lines.append(f"  {printable(guess.label).ljust(width)}  {bar} {100 * guess.probability:5.1f} %")
        if not result.guesses:
            lines.append("  no class reaches the threshold")
        if result.unsure:
            lines.append("  unsure: not probable enough for the requested precision")
        if result.ood_score is not None and result.ood_score > 0:
            lines.append(f"  unlike the training images (OOD score {result.ood_score:.1f}, above 0)")
        write("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Write nothing."""


class JsonLines:
    """A JSON object per image and line."""

    def add(self, path: str, result: Prediction | Unread) -> None:
        """Write an object; that of an unreadable image has an error."""
        if isinstance(result, Unread):
            write(json_line({"path": path, "error": result.reason}))
        else:
            guesses = [dataclasses.asdict(guess) for guess in result.guesses]
            trust = {"unsure": result.unsure, "ood_score": result.ood_score}
            stated = {name: value for name, value in trust.items() if value is not None}
            write(json_line({"path": path, "predictions": guesses, **stated}))

    def close(self) -> None:
        """Write nothing."""


class CsvLines:
    """A CSV table with a row per image and class, the most probable one first."""

    def __init__(self) -> None:
        write("path,rank,label,probability,error,unsure,ood_score\n")

    def add(self, path: str, result: Prediction | Unread) -> None:
        """Write the rows of an image; an unreadable one has one with an error, and one without classes an empty one."""
        rows: list[list[Any]]
        trust = ["", ""]
        if isinstance(result, Unread):
            rows = [["", "", "", printable(result.reason)]]
        else:
            rows = [[rank, printable(g.label), f"{g.probability:.6f}", ""] for rank, g in enumerate(result.guesses, 1)]
            trust[0] = "" if result.unsure is None else str(result.unsure).lower()
            trust[1] = "" if result.ood_score is None else f"{result.ood_score:.4f}"
        for row in rows or [["", "", "", ""]]:
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow([printable(path), *row, *trust])
            write(line.getvalue())

    def close(self) -> None:
        """Write nothing."""


class ParquetFile:
    """A parquet file with a row per image: path, labels, probabilities, unsure, ood_score, and an error if unreadable.

    Args:
        path: The file; it is replaced at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[str, list[str], list[float], bool | None, float | None, str | None]] = []

    def add(self, path: str, result: Prediction | Unread) -> None:
        """Keep the row of an image."""
        if isinstance(result, Unread):
            self._rows.append((printable(path), [], [], None, None, printable(result.reason)))
        else:
            names, values = ([g.label for g in result.guesses], [g.probability for g in result.guesses])
            self._rows.append((printable(path), names, values, result.unsure, result.ood_score, None))

    def close(self) -> None:
        """Write the file."""
        import pyarrow

        paths, labels, probabilities, unsure, scores, errors = zip(*self._rows, strict=True)
        text, number = pyarrow.string(), pyarrow.float64()
        write_table(
            self._path,
            path=pyarrow.array(paths, text),
            labels=pyarrow.array(labels, pyarrow.list_(text)),
            probabilities=pyarrow.array(probabilities, pyarrow.list_(number)),
            unsure=pyarrow.array(unsure, pyarrow.bool_()),
            ood_score=pyarrow.array(scores, number),
            error=pyarrow.array(errors, text),
        )


def write_table(file: Path, /, metadata: Mapping[str, str] | None = None, **columns: Any) -> None:
    """Write columns to a parquet file, atomically."""
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns, metadata=metadata), buffer)
    write_atomic(file, buffer.getvalue())
