"""The page of a report: one HTML file that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from resnext_hub.cards.model_card import chosen_by, duration, wilson_interval
from resnext_hub.plots.per_class import class_results
from resnext_hub.plots.theme import DARK, LIGHT
from resnext_hub.record import RunRecord
from resnext_hub.report.sections import Section
from resnext_hub.text import printable

PAGE = "report.html"
"""Name of the page."""

ROWS = 10
"""Classes in the table of those with the lowest recall."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot as PNG in each theme."""

    light: bytes
    dark: bytes

    def uri(self, theme: str) -> str:
        """Return a plot as a data URI."""
        content = self.dark if theme == DARK.name else self.light
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG."""
        return int.from_bytes(self.light[16:20]), int.from_bytes(self.light[20:24])


def render_page(record: RunRecord, sections: Sequence[Section], figures: Mapping[str, Figure]) -> str:
    """Return the page as HTML.

    All text from data is escaped, and a policy in the page forbids scripts and requests.

    Args:
        record: The run.
        sections: The parts of the report.
        figures: Plots by name; those that are missing could not be drawn.
    """
    import jinja2

    template = resources.files("resnext_hub.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters["line"] = printable
    return environment.from_string(template).render(
        record=record,
        facts=_facts(record),
        sections=sections,
        figures=figures,
        rows=_rows(record),
        several=record.reported.is_multi_label,
        settings=[(name, record.config[name]) for name in record.changed if record.config[name] is not None],
        light=LIGHT,
        dark=DARK,
    )


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the key figures of a run, each with its name."""
    reported, dataset, model = record.reported, record.dataset, record.model
    low, high = wilson_interval(reported.correct, reported.count)
    counts = f"{100 * reported.top1:.2f} % ({reported.correct:,}/{reported.count:,})"
    if reported.mean_average_precision is not None:
        facts = [("mean average precision", f"{100 * reported.mean_average_precision:.2f} %")]
        facts += [("all labels correct", counts)]
    else:
        facts = [
            (
                "accuracy",
                f"{counts}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %",
            )
        ]
    if reported.without_tta is not None:
        facts += [("without TTA", f"{100 * reported.without_tta:.2f} %, from the image alone")]
    height, width = model.input["input_size"][1:]
    train = "a stream of unknown length" if dataset.train_count is None else f"{dataset.train_count:,} training"
    parts = [train, f"{dataset.eval_count:,} evaluation"]
    parts += [f"{dataset.test_count:,} test"] if record.test is not None else []
    hardware = record.hardware
    return [
        *facts,
        ("measured on", _measured_on(record)),
        ("model", f"{model.variant or model.architecture}, {model.parameters:,} parameters, {width} x {height} pixels"),
        ("initial weights", record.base_model.id if record.base_model else "random"),
        ("dataset", f"{dataset.id}: {', '.join(parts)} images, {len(record.label_names):,} classes"),
        ("training", f"{record.epochs:.4g} epochs, {record.steps:,} steps; weights of step {reported.step:,}"),
        ("time", f"{duration(record.wall_seconds)} on {hardware.name} ({hardware.device})"),
    ]


def _measured_on(record: RunRecord) -> str:
    """Return which split chose the weights and which one measured them."""
    dataset, metric = record.dataset, chosen_by(record)
    evaluation = _images_of(dataset.eval_split, dataset.train_split)
    test = _images_of(dataset.test_split, dataset.train_split)
    if metric is None:
        return f"{evaluation if record.test is None else test}; the weights are those of the last step"
    if record.test is None:
        return (
            f"{evaluation}, on which the best weights were also selected by {metric}; results may be slightly "
            "optimistic"
        )
    other = "other " if test == evaluation else ""
    return f"{test}, evaluated once; the best weights were selected by {metric} on {other}{evaluation}"


def _images_of(stored: str | None, train: str) -> str:
    return f"images held out from {train}" if stored is None else f"the images of the {stored} split"


def _rows(record: RunRecord) -> list[dict[str, Any]]:
    """Return the classes with the lowest recall, without those of which every image is right."""
    rows, names = [], record.label_names
    for result in class_results(record):
        others = [] if record.reported.is_multi_label else record.reported.confusion[result.label]
        n, other = max(((n, -other) for other, n in others if other != result.label), default=(0, 0))
        rows.append(
            {
                "name": names[result.label],
                "recall": f"{100 * result.recall:.1f} %",
                "counts": f"{result.correct:,}/{result.count:,}",
                "precision": f"{100 * result.precision:.1f} %" if result.predicted else "never predicted",
                "confused": f"{names[-other]} ({n})" if n else "",
            }
        )
    return [row for row in rows if row["recall"] != "100.0 %"][:ROWS] or rows[:3]
