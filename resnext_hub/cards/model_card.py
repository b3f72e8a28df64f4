"""The model card: a pure function of a record."""

import heapq
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any
from urllib.parse import quote

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from resnext_hub.cards.card_file import Kept, put_together
from resnext_hub.models.complexity import PAPER_ERROR
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.record import BaseModelFacts, EvaluationFacts, HardwareFacts, RunRecord
from resnext_hub.text import code_span, markdown, printable, python_string

FEW = 20
"""Training images of a class below which it counts as rare; a quarter of the mean does as well."""

MOST_CLASSES = 30
"""Rows of the per-class table; with more classes, those with the lowest recall are shown."""


NAME = 100
"""Characters of a class name above which a card shortens it; all of it stands in config.json."""

TAGS = ("image-classification", "timm", "transformers", "resnext")


def render_card(
    record: RunRecord, repo_id: str | None = None, license: str | None = None, kept: Kept | None = None
) -> str:
    """Return the text of README.md: metadata in YAML, then Markdown.

    Args:
        record: The run.
        repo_id: Hub repository that the card is for; without one, the snippet loads the folder.
        license: Licence of the weights, an id of the Hub's list.
        kept: What the owner of the card wrote into it.
    """
    return put_together(*card_parts(record, repo_id, license), kept or Kept())


def card_parts(record: RunRecord, repo_id: str | None, license: str | None) -> tuple[str, str]:
    """Return what this package writes of a card: the metadata as YAML, and the text in Markdown."""
    return _metadata(record, repo_id, license), _body(record, repo_id, license)


def _body(record: RunRecord, repo_id: str | None, license: str | None) -> str:
    import jinja2

    template = resources.files("resnext_hub.cards").joinpath("model_card.md.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: the filters below escape what comes from data
    )
    environment.filters |= {
        "md": markdown,
        "code": code_span,
        "line": printable,
        "string": python_string,
        "cls": class_name,
    }
    evaluation, dataset, settings = record.evaluation, record.dataset, record.config
    rows = [row for row in _per_class(record) if row["count"] or len(record.label_names) <= MOST_CLASSES]
    unmeasured = [name for name, count in zip(record.label_names, evaluation.measured, strict=True) if not count]
    return environment.from_string(template).render(
        record=record,
        title=_title(record, repo_id),
        source=f"hf-hub:{repo_id}" if repo_id else f"local-dir:runs/{record.name}/model",
        repo_id=repo_id,
        conflict=license_conflict(record.base_model, license),
        dataset_link=_dataset_link(record),
        split_name=_split_name(record),
        held_out=dataset.eval_split != dataset.train_split,
        class_list=list_names(record.label_names),
        unmeasured=unmeasured,
        unmeasured_list=list_names(unmeasured),
        interval=wilson_interval(evaluation.correct, evaluation.count),
        percent=_percent,
        size=record.model.input["input_size"][-1],
        per_class=rows[:MOST_CLASSES],
        hidden=rows[MOST_CLASSES:],
        minutes=_duration(record.wall_seconds),
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


def _metadata(record: RunRecord, repo_id: str | None, license: str | None) -> str:
    evaluation, dataset = record.evaluation, record.dataset
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
                dataset_split=printable(dataset.eval_split) if dataset.eval_split else None,
                dataset_revision=printable(dataset.revision) if dataset.revision else None,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in (
                ("accuracy", "Top-1 accuracy", evaluation.top1),
                ("accuracy", "Top-5 accuracy", evaluation.top5),
                ("f1", _macro_f1_name(evaluation), evaluation.macro_f1),
                ("expected_calibration_error", "Expected calibration error, 15 bins", evaluation.calibration_error),
            )
            if value is not None
        ],
    )
    return str(data.to_yaml()) + "\n"


def _macro_f1_name(evaluation: EvaluationFacts) -> str:
    measured, classes = sum(count > 0 for count in evaluation.measured), len(evaluation.measured)
    return "Macro-F1" if measured == classes else f"Macro-F1 over the {measured} of {classes} classes measured"


def license_conflict(base: BaseModelFacts | None, license: str | None) -> str | None:
    """Say what the licence of the weights that training started from asks for and another licence does not give."""
    if base is None or license is None or license == base.license:
        return None
    what = f"{printable(base.id)}, from which training started,"
    if base.license is None:
        return f"the licence of {what} is not stated"
    parts, said = base.license.split("-"), printable(base.license)
    kept = "nc" in license.split("-")
    if "nc" in parts and not kept:
        return f"{what} is for non-commercial use only ({said})"
    if "nd" in parts:
        return f"{what} may not be shared in a changed form ({said})"
    if "sa" in parts or "gpl" in base.license:
        return f"{what} has to be shared under its own licence ({said})"
    return None


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Give the 95 % confidence interval of a proportion (Wilson 1927), which stays within 0 and 1."""
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _per_class(record: RunRecord) -> list[dict[str, Any]]:
    """Return a row for each class; of many, the lowest recall first and what was not measured last."""
    rows = []
    for label, (name, counts) in enumerate(zip(record.label_names, record.evaluation.confusion, strict=True)):
        count, right = sum(n for _, n in counts), dict(counts).get(label, 0)
        n, other = max(((n, -other) for other, n in counts if other != label), default=(0, 0))
        rows.append(
            {
                "name": class_name(name),
                "count": count,
                "right": right,
                "recall": _percent(right / count) if count else "not measured",
                "confused": f"{class_name(record.label_names[-other])} ({n})" if n else "",
                "order": right / count if count else 2.0,
            }
        )
    return sorted(rows, key=lambda row: float(row["order"])) if len(rows) > MOST_CLASSES else rows


def _paper(variant: str | None) -> str | None:
    if variant is None or variant not in PAPER_ERROR:
        return None
    where = "CIFAR-10" if VARIANTS[variant].small_stem else "ImageNet-1K"
    return f"{PAPER_ERROR[variant]:g} % top-1 error on {where}"


def _limits(record: RunRecord) -> list[str]:
    """Return what the data shows of where the model is weak."""
    names, limits = record.label_names, []
    counts = record.dataset.train_counts
    if counts is not None:
        enough = max(FEW, sum(counts) / len(counts) / 4)
        rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < enough]
        if rare:
            listed = ", ".join(f"{class_name(names[i])} ({counts[i]})" for i in rare[:8])
            more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            limits.append(f"Few images to learn from: {listed}{more}.")
    measured = record.evaluation.measured
    few = [names[i] for i, count in enumerate(measured) if 0 < count < 10]
    if few:
        limits.append(
            f"Fewer than 10 images to evaluate on, so that their recall says little: {list_names(few, most=8)}."
        )
    mistakes = [(-n, a, b) for a, row in enumerate(record.evaluation.confusion) for b, n in row if a != b]
    said = [
        f"{class_name(names[a])} for {class_name(names[b])} ({_times(-n)})" for n, a, b in heapq.nsmallest(3, mistakes)
    ]
    if said:
        limits.append(f"Most often it takes {', '.join(said)}.")
    limits.append(
        "The figures hold for images like those of the evaluation split; accuracy on others, and on images of none of "
        "its classes, was not measured."
    )
    return limits


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _dataset_link(record: RunRecord) -> str:
    dataset = record.dataset
    if dataset.hub_id:
        return f"[{markdown(dataset.hub_id)}](https://huggingface.co/datasets/{quote(printable(dataset.hub_id))})"
    if dataset.id == "digits":
        return "scikit-learn's bundled handwritten digits (1,797 images of 8 x 8 pixels)"
    return f"{code_span(dataset.id)}, a local dataset"


def _split_name(record: RunRecord) -> str:
    dataset = record.dataset
    if dataset.eval_split is None:
        seed = printable(record.config["split_seed"])
        return f"held out of {markdown(dataset.train_split)}, stratified, seed {seed}"
    trained = ", which it was trained on" if dataset.eval_split == dataset.train_split else ""
    return f"split {markdown(dataset.eval_split)}{trained}"


def class_name(name: str) -> str:
    """Return a class name in Markdown: a long one shortened, as a card has to be read back, a blank one in quotes."""
    text = printable(name)
    return markdown(f"{text[: NAME - 1]}…" if len(text) > NAME else text if text.strip() else f'"{text}"')


def list_names(names: Sequence[str], most: int = 12) -> str:
    """Return class names in Markdown, and of many how many more there are."""
    shown = ", ".join(class_name(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _hardware(hardware: HardwareFacts) -> str:
    precision = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}[hardware.mixed_precision]
    threads = f", {hardware.threads} threads" if hardware.device == "cpu" else ""
    return f"{markdown(hardware.name)} ({markdown(hardware.device)}{threads}, {precision})"
