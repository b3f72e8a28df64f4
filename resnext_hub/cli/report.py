"""`resnext-hub report`: draw all plots of a finished run, and a page that shows them."""

import argparse

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import add_threads, count, existing_path
from resnext_hub.text import printable

MOST_IMAGES = 100_000
"""Greatest allowed number of images; the time of t-SNE grows faster than their number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.report.write import IMAGES

    parser.add_argument("run", type=existing_path, help="run folder")
    parser.add_argument(
        "--images",
        type=count(MOST_IMAGES),
        default=IMAGES,
        metavar="N",
        help="maximum number of images to classify again, for the embedding plot and the reliability diagram (default: "
        f"{IMAGES:,})",
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Write the report, and print where it is."""
    from resnext_hub.report.write import write_report

    write(f"report: {printable(write_report(options.run, images=options.images, threads=options.threads))}\n")
