"""`resnext-hub recipes`: list the recipes, or show one with its settings and sources."""

import argparse

from resnext_hub.cli.output import json_line, table, write
from resnext_hub.errors import RequestError
from resnext_hub.settings import flag_of, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("name", nargs="?", help="recipe to show (default: list all)")
    parser.add_argument("--json", action="store_true", help="print only the settings, as JSON")


def run(options: argparse.Namespace) -> None:
    """Print the recipes, or one of them.

    Raises:
        RequestError: If there is no such recipe.
    """
    from resnext_hub.runs.recipes import RECIPES, find_recipe

    if options.name is None:
        if options.json:
            write(json_line({name: recipe.settings for name, recipe in RECIPES.items()}))
            return
        write(table([(name, recipe.purpose) for name, recipe in RECIPES.items()]))
        write("\nresnext-hub recipes NAME shows its settings; resnext-hub train --recipe NAME uses them\n")
        return
    try:
        recipe = find_recipe(options.name)
    except RequestError as error:
        raise RequestError(f"{shown(options.name)}: {error}") from error
    if options.json:
        tiers = {tier.name: tier.settings for tier in recipe.tiers}
        write(json_line(recipe.settings | ({"tiers": tiers} if tiers else {})))
        return
    write(f"{options.name}: {recipe.purpose}\nsource: {recipe.source}\nresult: {recipe.result}\n\n")
    write(table([_words(name, value) for name, value in recipe.settings.items()]))
    for tier in recipe.tiers:
        write(f"\n{tier.name}:\n")
        write(table([_words(name, value) for name, value in tier.settings.items()]))


def _words(name: str, value: object) -> tuple[str, str]:
    """Return a setting as a flag and its values."""
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(name).replace("--", "--no-", 1), ""
    return flag_of(name), " ".join(map(str, value)) if isinstance(value, list) else str(value)
