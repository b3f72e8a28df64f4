"""The model card, rendered from the record of a run alone."""

import heapq
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from resnext_hub.cards.card_file import TAGS as TAGS
from resnext_hub.cards.card_file import Kept, put_together
from resnext_hub.cards.statements import FIELD, facts_of
from resnext_hub.facts import BaseModelFacts, EvaluationFacts, HardwareFacts, LabelFacts
from resnext_hub.models.complexity import PAPER_ERROR
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.record import RunRecord
from resnext_hub.text import code_span, markdown, printable, python_string

FEW = 20
"""A class is rare with fewer training images than this, or than a quarter of the mean."""

MOST_CLASSES = 30
"""Largest number of rows in the per-class table, lowest recall first."""

NAME = 100
"""Longest class name in a card, in characters; config.json has the full name."""

CHOSEN_BY = {
    "top1": "accuracy",
    "macro-recall": "macro recall",
    "macro-f1": "macro-F1",
    "map": "mean average precision",
    "loss": "cross-entropy",
    "last": None,
}
"""What the values of `best_by` are called; None if nothing chooses the weights."""


def chosen_by(record: RunRecord) -> str | None:
    """Return what the published weights were chosen by; None if nothing did, as in a run without steps."""
    return CHOSEN_BY[str(record.config.get("best_by") or "top1")] if record.steps else None


def render_card(
    record: RunRecord,
    repo_id: str | None = None,
    license: str | None = None,
    kept: Kept | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Return the content of README.md: metadata in YAML, then Markdown.

    Args:
        record: The record of the run.
        repo_id: Repository of the card; without one, the snippets load the local folder.
        license: License of the weights, an ID from the Hub's list.
        kept: The parts that the owner of the card wrote.
        config: The config.json of the model; without it, the card has no facts for `resnext-hub verify`.
    """
    return put_together(*card_parts(record, repo_id, license, config), kept or Kept())


def card_parts(
    record: RunRecord, repo_id: str | None, license: str | None, config: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """Return the generated parts of a card: the metadata as YAML, and the body as Markdown."""
    return _metadata(record, repo_id, license, config), _body(record, repo_id, license)


def _body(record: RunRecord, repo_id: str | None, license: str | None) -> str:
    import jinja2

    template = resources.files("resnext_hub.cards").joinpath("model_card.md.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Markdown; the filters below escape text from data
    )
    environment.filters |= {
        "md": markdown,
        "code": code_span,
        "line": printable,
        "string": python_string,
        "cls": class_name,
    }
    reported, dataset, settings = record.reported, record.dataset, record.config
    rows = class_rows(record.label_names, reported.confusion, reported.labels)
    unmeasured = [name for name, count in zip(record.label_names, reported.measured, strict=True) if not count]
    results = [(split_name(record, part), facts) for part, facts in _results(record)]
    return environment.from_string(template).render(
        record=record,
        title=_title(record, repo_id),
        source=f"hf-hub:{repo_id}" if repo_id else f"local-dir:runs/{record.name}/model",
        repo_id=repo_id,
        conflict=license_conflict(record.base_model, license),
        dataset_link=_dataset_link(record),
        reported=reported,
        several=reported.is_multi_label,
        thresholds=_thresholds(record),
        chosen_by=chosen_by(record),
        part="evaluation" if record.test is None else "test",
        results=[(name, facts, wilson_interval(facts.correct, facts.count)) for name, facts in results],
        eval_name=split_name(record, "evaluation"),
        test_name=split_name(record, "test"),
        held_out=dataset.eval_split != dataset.train_split,
        class_list=list_names(record.label_names),
        unmeasured=unmeasured,
        unmeasured_list=list_names(unmeasured),
        sample_labels=", ".join(map(class_name, record.sample.labels)) or "none",
        interval=wilson_interval(reported.correct, reported.count),
        percent=_percent,
        size=record.model.input["input_size"][-1],
        per_class=rows[:MOST_CLASSES],
        hidden=rows[MOST_CLASSES:],
        duration=duration(record.wall_seconds),
        hardware=_hardware(record.hardware),
        settings=[(name, settings[name]) for name in record.changed if settings[name] is not None],
        defaults=[(n, v) for n, v in settings.items() if n not in record.changed and v is not None],
        paper=_paper(record.model.variant),
        sample=", ".join(f"{class_name(name)} ({_percent(value)})" for name, value in record.sample.output),
        limits=_limits(record),
        plots=record.plots,
    )


def _title(record: RunRecord, repo_id: str | None) -> str:
    return repo_id.partition("/")[2] or repo_id if repo_id else printable(record.name)


def _metadata(record: RunRecord, repo_id: str | None, license: str | None, config: Mapping[str, Any] | None) -> str:
    dataset = record.dataset
    stored = {"evaluation": dataset.eval_split, "test": dataset.test_split}
    data = ModelCardData(
        model_name=_title(record, repo_id),
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(TAGS),
        datasets=[printable(dataset.hub_id)] if dataset.hub_id else None,
        base_model=printable(record.base_model.hub_id) if record.base_model and record.base_model.hub_id else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=printable(dataset.hub_id or dataset.id),
                dataset_name=printable(dataset.id),
                dataset_split=printable(stored[part]) if stored[part] else None,
                dataset_revision=printable(dataset.revision) if dataset.revision else None,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for part, facts in _results(record)
            for kind, name, value in (
                ("mean_average_precision", _macro_name("Mean average precision", facts), facts.mean_average_precision),
                ("accuracy", "All labels correct" if facts.is_multi_label else "Top-1 accuracy", facts.top1),
                ("accuracy", "Top-5 accuracy", facts.top5),
                (
                    "mean_average_precision" if facts.is_multi_label else "accuracy",
                    f"{'Mean average precision' if facts.is_multi_label else 'Top-1 accuracy'} without test-time "
                    "augmentation",
                    facts.without_tta,
                ),
                ("f1", _macro_name("Macro-F1", facts), facts.macro_f1),
                ("recall", _macro_name("Macro recall", facts), facts.macro_recall),
                ("expected_calibration_error", "Expected calibration error, 15 bins", facts.calibration_error),
                (
                    "expected_calibration_error",
                    "Expected calibration error before calibration, 15 bins",
                    facts.uncalibrated_error,
                ),
            )
            if value is not None
        ],
    )
    if config is not None:
        data[FIELD] = facts_of(record, config)
    return str(data.to_yaml()) + "\n"


def _results(record: RunRecord) -> list[tuple[Literal["evaluation", "test"], EvaluationFacts]]:
    """Return the results of a run by split; those that describe the weights best come first."""
    evaluation: list[tuple[Literal["evaluation", "test"], EvaluationFacts]] = [("evaluation", record.evaluation)]
    return evaluation if record.test is None else [("test", record.test), *evaluation]


def _macro_name(name: str, facts: EvaluationFacts) -> str:
    measured, classes = sum(count > 0 for count in facts.measured), len(facts.measured)
    return name if measured == classes else f"{name} ({measured} of {classes} classes measured)"


def license_conflict(base: BaseModelFacts | None, license: str | None) -> str | None:
    """Return the restriction of the base model's license that another license does not meet, or None."""
    if base is None or license is None or license == base.license:
        return None
    name = f"the base model {printable(base.id)}"
    if base.license is None:
        return f"the license of {name} is not stated"
    parts, stated = base.license.split("-"), printable(base.license)
    if "nc" in parts and "nc" not in license.split("-"):
        return f"{name} is for non-commercial use only ({stated})"
    if "nd" in parts:
        return f"{name} must not be shared in modified form ({stated})"
    if "sa" in parts or "gpl" in base.license:
        return f"modified versions of {name} must be shared under the same license ({stated})"
    return None


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval (1927) of a proportion, 95 % by default; it stays within [0, 1]."""
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def class_rows(
    names: Sequence[str], confusion: Sequence[Sequence[tuple[int, int]]], labels: Sequence[LabelFacts] | None
) -> list[dict[str, Any]]:
    """Return the rows of the table of classes or labels; if there are many, only of those that were measured."""
    rows = _per_class(names, confusion) if labels is None else _per_label(names, labels)
    return [row for row in rows if row["count"] or len(names) <= MOST_CLASSES]


def _per_class(names: Sequence[str], confusion: Sequence[Sequence[tuple[int, int]]]) -> list[dict[str, Any]]:
    """Return a row per class; if there are many, sorted by recall, with unmeasured classes last."""
    rows = []
    for label, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        count, correct = sum(n for _, n in counts), dict(counts).get(label, 0)
        n, other = max(((n, -other) for other, n in counts if other != label), default=(0, 0))
        rows.append(
            {
                "name": class_name(name),
                "count": count,
                "correct": correct,
                "recall": _percent(correct / count) if count else "not measured",
                "confused": f"{class_name(names[-other])} ({n})" if n else "",
                "order": correct / count if count else 2.0,
            }
        )
    return sorted(rows, key=lambda row: float(row["order"])) if len(rows) > MOST_CLASSES else rows


def _thresholds(record: RunRecord) -> str:
    """Return the thresholds of the labels as Python code; many are only in config.json."""
    labels = record.reported.labels or []
    if len(labels) > MOST_CLASSES:
        return f"[0.5] * {len(labels)}  # the best ones are in config.json, in resnext_hub.thresholds"
    return str([float(f"{label.threshold:.6g}") for label in labels])


def _per_label(names: Sequence[str], labels: Sequence[LabelFacts]) -> list[dict[str, Any]]:
    """Return a row per label of images that can have several; if there are many, sorted by average precision."""
    rows = []
    for name, label in zip(names, labels, strict=True):
        value = label.average_precision
        rows.append(
            {
                "name": class_name(name),
                "count": label.positives,
                "ap": "not measured" if value is None else _percent(value),
                "threshold": f"{label.threshold:.3f}",
                "precision": _percent(label.true_positives / label.predicted) if label.predicted else "never predicted",
                "recall": _percent(label.true_positives / label.positives) if label.positives else "not measured",
                "order": 2.0 if value is None else value,
            }
        )
    return sorted(rows, key=lambda row: float(str(row["order"]))) if len(rows) > MOST_CLASSES else rows


def _paper(variant: str | None) -> str | None:
    if variant is None or variant not in PAPER_ERROR:
        return None
    dataset = "CIFAR-10" if VARIANTS[variant].small_stem else "ImageNet-1K"
    return f"{PAPER_ERROR[variant]:g} % top-1 error on {dataset}"


def _limits(record: RunRecord) -> list[str]:
    """Return sentences about known weaknesses of the model and its evaluation."""
    names, limits = record.label_names, []
    counts = record.dataset.train_counts
    if counts is not None:
        enough = max(FEW, sum(counts) / len(counts) / 4)
        rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < enough]
        if rare:
            listed = ", ".join(f"{class_name(names[i])} ({counts[i]})" for i in rare[:8])
            more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            limits.append(f"Classes with few training images: {listed}{more}.")
    measured, part = record.reported.measured, "evaluation" if record.test is None else "test"
    few = [names[i] for i, count in enumerate(measured) if 0 < count < 10]
    if few:
        limits.append(
            f"Classes with fewer than 10 {part} images, for which the recall is unreliable: {list_names(few, most=8)}."
        )
    mistakes = [(-n, a, b) for a, row in enumerate(record.reported.confusion) for b, n in row if a != b]
    confusions = [
        f"{class_name(names[a])} as {class_name(names[b])} ({_times(-n)})" for n, a, b in heapq.nsmallest(3, mistakes)
    ]
    if confusions:
        limits.append(f"Most frequent confusions: {', '.join(confusions)}.")
    limits.append(
        f"The results apply to images like those of the {part} split. Accuracy on other kinds of images was not "
        "measured."
    )
    return limits


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _dataset_link(record: RunRecord) -> str:
    dataset = record.dataset
    if dataset.hub_id:
        return f"[{markdown(dataset.hub_id)}](https://huggingface.co/datasets/{quote(printable(dataset.hub_id))})"
    if dataset.id == "digits":
        return "scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels)"
    return f"{code_span(dataset.id)}, a {'downloaded file' if '://' in dataset.id else 'local dataset'}"


def split_name(record: RunRecord, part: Literal["evaluation", "test"]) -> str:
    """Return a phrase in Markdown for where the images of a part of a run come from."""
    dataset = record.dataset
    split = dataset.eval_split if part == "evaluation" else dataset.test_split
    if split is None:
        seed = printable(record.config["split_seed"])
        if record.config.get("folds") is not None:
            fold, folds = (printable(record.config.get(name)) for name in ("fold", "folds"))
            return f"fold {fold} of {folds} of {markdown(dataset.train_split)}, stratified, seed {seed}"
        test = " for a test" if part == "test" else ""
        return f"held out from {markdown(dataset.train_split)}{test}, stratified, seed {seed}"
    trained = ", also used for training" if split == dataset.train_split else ""
    return f"split {markdown(split)}{trained}"


def class_name(name: str) -> str:
    """Return a class name in Markdown; long names are shortened to bound the size of a card, blank ones are quoted."""
    text = printable(name)
    return markdown(f"{text[: NAME - 1]}…" if len(text) > NAME else text if text.strip() else f'"{text}"')


def list_names(names: Sequence[str], most: int = 12) -> str:
    """Return class names in Markdown, with a count in place of those beyond `most`."""
    shown = ", ".join(class_name(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Return a time in words, rounded."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _hardware(hardware: HardwareFacts) -> str:
    precision = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}[hardware.mixed_precision]
    threads = f", {hardware.threads} thread{'s' if hardware.threads != 1 else ''}" if hardware.device == "cpu" else ""
    return f"{markdown(hardware.name)} ({markdown(hardware.device)}{threads}, {precision})"
