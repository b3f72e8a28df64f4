"""`resnext-hub verify`: check a published model against its card."""

import argparse

from resnext_hub.cli.output import table, write
from resnext_hub.cli.parser import add_threads
from resnext_hub.errors import RunError
from resnext_hub.text import listing, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("model", metavar="REPO", help="hf-hub:owner/name[@revision], model folder or run folder")
    parser.add_argument("--dataset", metavar="PATH", help="path of the dataset, if the card names a local one")
    parser.add_argument("--exclude", metavar="FILE", help="list of images that the run excluded, if any")
    parser.add_argument(
        "--evaluate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="evaluate the model again, using only timm if timm has the architecture, and compare the numbers of "
        "correct predictions (default: on); --no-evaluate checks only the files",
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Print a line for each check.

    Raises:
        RunError: If something differs.
    """
    from resnext_hub.runs.verify import verify

    checks = verify(
        options.model,
        dataset=options.dataset,
        exclude=options.exclude,
        evaluate=options.evaluate,
        threads=options.threads,
    )
    rows, wrong = [("", "stated", "found", "")], []
    try:
        for check in checks:
            rows.append((check.what, check.stated, check.found, "ok" if check.same else "differs"))
            wrong += [] if check.same else [check.what]
    finally:
        if len(rows) > 1:
            write(table(rows))
    if wrong:
        raise RunError(f"{printable(options.model)} differs from its card: {listing(wrong)}")
