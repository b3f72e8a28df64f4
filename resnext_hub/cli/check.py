"""`resnext-hub check`: examine a dataset before training on it, or the labels of the dataset of a finished run."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_hub.cli.output import json_line, write
from resnext_hub.cli.parser import add_config_flags, new_path
from resnext_hub.data.config import DataConfig
from resnext_hub.data.exclude import exclusion_list
from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.files import write_atomic
from resnext_hub.run_folder import RunFolder
from resnext_hub.settings import check_value
from resnext_hub.text import printable
from resnext_hub.training.config import fields_of

if TYPE_CHECKING:
    from resnext_hub.check.findings import Findings
    from resnext_hub.check.labels import LabelFindings
    from resnext_hub.check.survey import Survey

_UNUSED = ("dataset", "streaming", "shuffle_block", "lanes", "max_bad_fraction", "folds", "fold")
"""Settings of a dataset that are given otherwise, or have no meaning here."""

GRID_ROWS = 12
"""Groups of duplicates in the grid."""

GRID_IMAGES = 30
"""Images with probably wrong labels in the grid."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "dataset",
        metavar="DATASET_OR_RUN",
        help="dataset, as for train --dataset, or the folder of a finished run, to find images in the dataset of the "
        "run whose labels are probably wrong according to its model",
    )
    parser.add_argument("--json", action="store_true", help="print all findings as one JSON object")
    parser.add_argument(
        "--grid",
        type=new_path,
        metavar="FILE",
        help="draw the worst duplicates, or the images with the most suspicious labels, to this PNG file",
    )
    parser.add_argument(
        "--write-exclude",
        type=new_path,
        metavar="FILE",
        help="write a list of images to exclude, for train --exclude: unreadable images, all duplicates with different "
        "labels, and all but one image of every other group of duplicates; given a run, the training images whose "
        "labels are probably wrong",
    )
    add_config_flags(parser, {name: field for name, field in fields_of(DataConfig).items() if name not in _UNUSED})


def run(options: argparse.Namespace) -> None:
    """Print the findings.

    Raises:
        RunError: If there are problems: unreadable images, or duplicates across splits or with different labels.
            Labels that are probably wrong are for somebody to look at; they are no problem in this sense.
    """
    for path in filter(None, (options.grid, options.write_exclude)):
        if not path.absolute().parent.is_dir():
            raise RequestError(f"{printable(path)}: the parent folder does not exist; create it first")
    folder = RunFolder(Path(os.path.expanduser(options.dataset)))
    if os.path.isfile(folder.record):
        _check_labels(folder.path, options)
    else:
        _check_dataset(options)


def _check_dataset(options: argparse.Namespace) -> None:
    from resnext_hub.check.findings import examine
    from resnext_hub.check.report import as_json, as_text
    from resnext_hub.check.survey import survey

    fields = {name: field for name, field in fields_of(DataConfig).items() if hasattr(options, name)}
    config = DataConfig(**{name: check_value(name, getattr(options, name), f.type) for name, f in fields.items()})
    surveyed = survey(config)
    findings = examine(surveyed)
    write(json_line(as_json(findings)) if options.json else as_text(findings))
    if options.write_exclude:
        found = [(surveyed.stored[facts.split], facts.row, facts.name, reason) for facts, reason in findings.excluded()]
        write_atomic(options.write_exclude, exclusion_list(surveyed.source_digest, [*surveyed.excluded, *found]))
    if options.grid and findings.groups:
        _draw(surveyed, findings, options.grid)
    if findings.problems:
        what = "1 problem" if findings.problems == 1 else f"{findings.problems} problems"
        raise RunError(
            f"{what} found; a problem is an unreadable image, or a group of duplicates across splits or with different "
            "labels"
        )


def _check_labels(run: Path, options: argparse.Namespace) -> None:
    from resnext_hub.check.label_report import as_json, as_text
    from resnext_hub.check.labels import check_labels

    given = [name for name in fields_of(DataConfig) if name not in _UNUSED and hasattr(options, name)]
    if given:
        raise RequestError(
            f"{setting(given[0])} cannot be combined with a run: {printable(run)} has its own settings; omit this flag"
        )
    findings = check_labels(run)
    write(json_line(as_json(findings)) if options.json else as_text(findings))
    if options.write_exclude:
        write_atomic(options.write_exclude, exclusion_list(findings.source_digest, findings.entries()))
    if options.grid and findings.wrong:
        _draw_labels(findings, options.grid)
    if findings.unreadable:
        count = len(findings.unreadable)
        raise RunError(f"{count} unreadable {'image' if count == 1 else 'images'} found")


def _draw_labels(findings: "LabelFindings", path: Path) -> None:
    from resnext_hub.plots.labels import Suspect, plot_wrong_labels
    from resnext_hub.plots.write import save_plot

    suspects = [
        Suspect(
            row=found.part.images.row(found.index),
            name=f"{found.part.name}: {found.name}",
            label=found.label,
            suggested=found.suggested,
            probability=found.probability,
        )
        for found in findings.wrong[:GRID_IMAGES]
    ]
    names = findings.label_names
    if not save_plot(path, names, partial(plot_wrong_labels, suspects, names)):
        raise RunError(f"{printable(path)} could not be written")


def _draw(surveyed: "Survey", findings: "Findings", path: Path) -> None:
    from resnext_hub.plots.duplicates import COLUMNS, Tile, plot_groups
    from resnext_hub.plots.write import save_plot

    names = findings.label_names
    groups = [
        [
            Tile(
                row=surveyed.splits[facts.split].row(facts.index),
                name=f"{facts.split}: {facts.name}",
                label=", ".join(names[i] for i in facts.labels) or "none",
            )
            for facts in group.images[:COLUMNS]
        ]
        for group in findings.groups[:GRID_ROWS]
    ]
    if not save_plot(path, names, partial(plot_groups, groups)):
        raise RunError(f"{printable(path)} could not be written")
