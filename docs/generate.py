"""Fill in the reference from the code when the site is built, so that it cannot differ from the package.

A page holds markers such as `<!-- generate: commands -->`; MkDocs calls `on_page_markdown` for each page. Run as a
script, it redraws `docs/block.png`, which is checked in so that GitHub shows it.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnext_hub.cli.main import COMMANDS, build_parser
from resnext_hub.models.complexity import info_rows
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.plots.block import plot_block
from resnext_hub.runs.recipes import RECIPES
from resnext_hub.training.config import FlatField, flat_fields

WIDTH = 76
"""Columns of the printed help."""

RESUME = {"fixed": "", "grows": "may be increased", "free": "may change"}
"""What may happen to a setting when a run is resumed."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page by what they name."""
    return re.sub(r"<!-- generate: (\w+) -->", lambda marker: GENERATORS[marker[1]](), markdown)


def commands() -> str:
    """Return the help of every command, as `--help` prints it."""
    os.environ["COLUMNS"] = str(WIDTH + 2)
    parts = []
    for words, parser in _parsers(build_parser(), ()):
        name = " ".join(("resnext-hub", *words))
        parts.append(f"{'#' * (2 if len(words) < 2 else 3)} {name}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def settings() -> str:
    """Return a table of the settings of `train` for each group."""
    groups: dict[str, list[FlatField]] = {}
    for field in flat_fields().values():
        groups.setdefault(field.group, []).append(field)
    parts = []
    for group, fields in groups.items():
        rows = [
            (f"`{field.name}`", _default(field.default), RESUME[field.resume], " ".join(field.help.split()))
            for field in fields
        ]
        parts.append(f"### {group}\n\n{_table(('setting', 'default', 'on resume', 'meaning'), rows)}")
    return "\n\n".join(parts)


def recipes() -> str:
    """Return a table of the recipes, and for each what it sets over the defaults, and where that comes from."""
    parts = [_table(("recipe", "purpose"), [(f"`{name}`", recipe.purpose) for name, recipe in RECIPES.items()])]
    for name, recipe in RECIPES.items():
        rows = [(f"`{key}`", _default(value)) for key, value in recipe.settings.items()]
        parts.append(f"### {name}\n\nSource: {recipe.source}.\n\nResult: {recipe.result}.")
        parts.append(_table(("setting", "value"), rows))
        for tier in recipe.tiers:
            rows = [(f"`{key}`", _default(value)) for key, value in tier.settings.items()]
            parts.append(f"{tier.name[0].upper()}{tier.name[1:]}:")
            parts.append(_table(("setting", "value"), rows))
    return "\n\n".join(parts)


def variants() -> str:
    """Return the table that `resnext-hub info` prints."""
    head, *rows = info_rows(list(VARIANTS.values()))
    return _table(head, [(f"`{row[0]}`", *row[1:]) for row in rows])


def write_block(path: Path) -> None:
    """Write the figure of docs/cardinality.md, at twice the size at which a page shows it."""
    plot_block().savefig(path, dpi=200, metadata={"Software": None})


def _parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...]
) -> Iterable[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                assert words or name in COMMANDS
                yield from _parsers(child, (*words, name))


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(f"{part:.4g}" for part in value)
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


GENERATORS: Mapping[str, Callable[[], str]] = {
    function.__name__: function for function in (commands, settings, recipes, variants)
}
"""What a marker may name."""

if __name__ == "__main__":
    write_block(Path(__file__).with_name("block.png"))
