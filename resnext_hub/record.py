"""Every fact about a finished run, in one JSON file that training writes and everything after it reads."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from resnext_hub.errors import RequestError
from resnext_hub.facts import (
    Amount,
    BaseModelFacts,
    CalibrationFacts,
    Count,
    DatasetFacts,
    EvaluationFacts,
    HardwareFacts,
    ModelFacts,
    OodFacts,
    SampleFacts,
    Some,
    UnreadableImage,
)
from resnext_hub.files import convert, read_json, write_atomic
from resnext_hub.text import printable

FORMAT_VERSION = 3
"""Version 2 made the confusion matrix sparse; version 3 renamed `broken_pictures` to `unreadable_images`."""

PLOTS = ("curves.png", "confusion_matrix.png", "labels.png", "reliability.png")
"""Plots of a model folder, which its card shows and which are published."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run."""

    format_version: int = FORMAT_VERSION
    name: str
    config: dict[str, Any]
    """The resolved configuration, flat; a local dataset is reduced to its folder's name."""
    changed: list[str]
    """Settings that are not at their defaults."""
    command: str
    """The non-default settings, as a command that repeats the run."""
    model: ModelFacts
    base_model: BaseModelFacts | None
    dataset: DatasetFacts
    label_names: list[str]
    steps: Count
    planned_steps: Count | None = None
    """Steps that the run would have had without early stopping; None in records of versions without it."""
    epochs: Amount
    """Passes over the training split."""
    evaluation: EvaluationFacts
    """On the split that chose the weights."""
    test: EvaluationFacts | None = None
    """On the test split, measured once; None if there was no test."""
    calibration: CalibrationFacts | None = None
    """None if the weights are published as trained."""
    ood: list[OodFacts] = field(default_factory=list)
    """By dataset; empty if the model has no score of out-of-distribution images."""
    sample: SampleFacts
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    versions: dict[str, str]
    hardware: HardwareFacts
    processes: Some
    git_commit: str | None
    wall_seconds: Amount
    resumes: Count
    skipped_steps: Count
    """Steps that the optimizer skipped because fp16 gradients overflowed."""
    decoders: list[str] = field(default_factory=list)
    """Decoders of the training images, in order of use: several if a run was resumed with another one."""
    unreadable_images: list[UnreadableImage] = field(default_factory=list)
    plots: list[str] = field(default_factory=lambda: list(PLOTS[:2]))
    """Plots in the model folder."""
    merged_groups: dict[str, Some] = field(default_factory=dict)
    """Number of neighboring groups that were computed as one in training, by layer name."""
    class_weights: list[Amount] | None = None
    """Weight of each class in the training loss; None if all were equal."""

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step, because it did not improve any more."""
        return self.planned_steps is not None and self.steps < self.planned_steps

    @property
    def reported(self) -> EvaluationFacts:
        """The results that describe the weights best: on the test split if there is one."""
        return self.evaluation if self.test is None else self.test

    def __post_init__(self) -> None:
        """Refuse a record that contradicts itself, as a damaged file does.

        Raises:
            ValueError: If two parts contradict each other.
        """
        classes, dataset = len(self.label_names), self.dataset
        evaluations = [(self.evaluation, dataset.eval_count)]
        if self.test is not None:
            evaluations.append((self.test, dataset.test_count))
        size = self.model.input.get("input_size")
        for holds, what in (
            (all(len(part.measured) == classes for part, _ in evaluations), "results for every class"),
            (all(part.count <= count for part, count in evaluations), "count <= eval_count and test_count"),
            (
                all(part.step <= self.steps for part, _ in evaluations),
                "the step of an evaluation to be one of the steps",
            ),
            (re.fullmatch("[0-9a-f]{64}", self.model.weights_sha256), "a SHA-256 in weights_sha256"),
            (_is_count_of(dataset.train_counts, classes), "train_counts for every class"),
            (_is_count_of(dataset.eval_counts, classes), "eval_counts for every class"),
            (_is_count_of(dataset.test_counts, classes), "test_counts for every class"),
            (len({part.is_multi_label for part, _ in evaluations}) == 1, "the same kind of labels in both splits"),
            (self.class_weights is None or len(self.class_weights) == classes, "class_weights for every class"),
            (set(self.changed) <= self.config.keys(), "all settings in changed to be in config"),
            (self.config.keys() >= _CARD_SETTINGS, f"config with {', '.join(sorted(_CARD_SETTINGS))}"),
            (
                isinstance(size, list) and [type(n) for n in size] == [int] * 3 and min(size) > 0,
                "an input_size of three positive numbers",
            ),
            (self.sample.output, "an output for the sample"),
            (
                {*self.label_names} >= {*self.sample.labels, *(name for name, _ in self.sample.output)},
                "all classes in sample to be in label_names",
            ),
            (set(self.plots) <= set(PLOTS), f"plots of {', '.join(PLOTS)}"),
        ):
            if not holds:
                raise ValueError(f"expected {what}")

    def save(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_atomic(path, _json(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Load a record of this format version or of an earlier one, which is converted.

        Raises:
            RequestError: If there is none, it is damaged, or its version is unknown.
        """
        if not os.path.lexists(path):
            _refuse_missing(path)
        content = read_json(path, dict[str, Any], _WAY_OUT)
        version = content.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
            raise RequestError(
                f"{printable(path)} has format version {printable(version)[:40]}; this version of resnext-hub reads "
                f"versions 1 to {FORMAT_VERSION}; update resnext-hub, or " + _WAY_OUT
            )
        return convert(_upgraded(content, version), cls, path, _WAY_OUT)


_WAY_OUT = "remove the file, and rerun the training command to write it again"

_CARD_SETTINGS = frozenset({"split_seed", "ema", "streaming", "shuffle_block"})
"""Settings that a card mentions."""


def _json(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each entry, but with rows of numbers on one line: most of a record is counts."""
    inner, lines = f"{indent}  ", list[str]()
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(name, ensure_ascii=False)}: {_json(part, inner)}" for name, part in value.items()]
    elif isinstance(value, (list, tuple)) and not _is_row(value):
        lines = [inner + _json(part, inner) for part in value]
    if not lines:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    start, end = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([start, ",\n".join(lines), indent + end])


def _is_row(values: Sequence[Any]) -> bool:
    """Return whether a list contains numbers, or pairs and other lists of numbers."""
    numbers = (number for value in values for number in (value if isinstance(value, (list, tuple)) else [value]))
    return all(isinstance(number, (int, float)) for number in numbers)


def sparse_rows(dense: Iterable[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Return the nonzero entries of each row of a matrix, as (column, value)."""
    return [[(column, value) for column, value in enumerate(row) if value] for row in dense]


def _upgraded(content: dict[str, Any], version: int) -> dict[str, Any]:
    """Convert a record of an earlier version; malformed parts are left for validation to reject."""
    content = content | {"format_version": FORMAT_VERSION}
    evaluation = content.get("evaluation")
    rows = evaluation.get("confusion") if isinstance(evaluation, dict) and version < 2 else None
    if isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(rows) for row in rows):
        content["evaluation"] = dict(evaluation or {}, confusion=sparse_rows(rows))
    if version < 3 and isinstance(entries := content.pop("broken_pictures", None), list):
        content["unreadable_images"] = [renamed_image(entry) for entry in entries]
    return content


def renamed_image(entry: Any) -> Any:
    """Return an entry about an unreadable image with today's key; before version 3 the key was `picture`."""
    if not isinstance(entry, dict) or "picture" not in entry:
        return entry
    return {"image" if name == "picture" else name: value for name, value in entry.items()}


def _refuse_missing(path: Path) -> NoReturn:
    folder = path.parent
    if not os.path.isdir(folder):
        raise RequestError(f"{printable(folder)} does not exist")
    if os.path.lexists(folder / "config.yaml"):
        raise RequestError(f"the run in {printable(folder)} is not finished; rerun its training command to resume it")
    hint = f"; did you mean {printable(folder.parent)}?" if os.path.isfile(folder.parent / "record.json") else ""
    raise RequestError(f"{printable(folder)} has no record.json, so it is not a run folder{hint}")


def _is_count_of(counts: list[int] | None, classes: int) -> bool:
    return counts is None or (len(counts) == classes and all(count >= 0 for count in counts))
