"""The model card: a pure function of a record."""

import heapq
import math
from importlib import resources
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from resnext_hub.models.complexity import PAPER_ERROR
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.record import BaseModelFacts, HardwareFacts, RunRecord

FEW = 20
"""Training pictures of a class below which it counts as rare; a quarter of the mean does as well."""

MOST_CLASSES = 30
"""Rows of the per-class table; with more classes, those with the lowest recall are shown."""


def render_card(record: RunRecord, repo_id: str | None = None, license: str | None = None) -> str:
    """Give the text of README.md: metadata in YAML, then Markdown.

    Args:
        record: The run.
        repo_id: Hub repository that the card is for; without one, the snippet loads the folder.
        license: Licence of the weights, an id of the Hub's list.
    """
    import jinja2

    template = resources.files("resnext_hub.hub").joinpath("card.md.jinja").read_text()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    evaluation, dataset = record.evaluation, record.dataset
    rows = _per_class(record)
    settings = record.config
    body = environment.from_string(template).render(
        record=record,
        title=repo_id.partition("/")[2] or repo_id if repo_id else record.name,
        source=f"hf-hub:{repo_id}" if repo_id else f"local-dir:runs/{record.name}/model",
        repo_id=repo_id,
        conflict=license_conflict(record.base_model, license),
        dataset_link=_dataset_link(record),
        split_name=_split_name(record),
        class_list=_class_list(record.label_names),
        interval=wilson_interval(evaluation.correct, evaluation.count),
        percent=_percent,
        size=record.model.input["input_size"][-1],
        per_class=rows[:MOST_CLASSES],
        hidden_classes=max(len(rows) - MOST_CLASSES, 0),
        minutes=_duration(record.wall_seconds),
        hardware=_hardware(record.hardware),
        settings=[(name, settings[name]) for name in record.changed if settings[name] is not None],
        defaults=[(n, v) for n, v in settings.items() if n not in record.changed and v is not None],
        paper=_paper(record.model.variant),
        sample=", ".join(f"{_cell(name)} ({_percent(value)})" for name, value in record.sample.output),
        limits=_limits(record),
        cell=_cell,
        plots=record.plots,
    )
    data = ModelCardData(
        model_name=repo_id.partition("/")[2] or repo_id if repo_id else record.name,
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "resnext"],
        datasets=[dataset.hub_id] if dataset.hub_id else None,
        base_model=record.base_model.hub_id if record.base_model else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset.hub_id or dataset.id,
                dataset_name=dataset.id,
                dataset_split=dataset.eval_split,
                dataset_revision=dataset.revision,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in (
                ("accuracy", "Top-1 accuracy", evaluation.top1),
                ("accuracy", "Top-5 accuracy", evaluation.top5),
                ("f1", "Macro-F1", evaluation.macro_f1),
                ("expected_calibration_error", "Expected calibration error, 15 bins", evaluation.calibration_error),
            )
            if value is not None
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def license_conflict(base: BaseModelFacts | None, license: str | None) -> str | None:
    """Say what the licence of the weights that training started from asks for and another licence does not give."""
    if base is None or license is None or license == base.license:
        return None
    if base.license is None:
        return f"the licence of {base.id}, from which training started, is not stated"
    parts = base.license.split("-")
    kept = "nc" in license.split("-")
    if "nc" in parts and not kept:
        return f"{base.id}, from which training started, is for non-commercial use only ({base.license})"
    if "nd" in parts:
        return f"{base.id}, from which training started, may not be shared in a changed form ({base.license})"
    if "sa" in parts or "gpl" in base.license:
        return f"{base.id}, from which training started, has to be shared under its own licence ({base.license})"
    return None


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Give the 95 % confidence interval of a proportion (Wilson 1927), which stays within 0 and 1."""
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _per_class(record: RunRecord) -> list[dict[str, Any]]:
    rows = []
    for label, (name, counts) in enumerate(zip(record.label_names, record.evaluation.confusion, strict=True)):
        count, right = sum(n for _, n in counts), dict(counts).get(label, 0)
        wrong = [(n, other) for other, n in counts if other != label]
        n, other = max(wrong, default=(0, 0), key=lambda pair: (pair[0], -pair[1]))
        rows.append(
            {
                "name": _cell(name),
                "count": count,
                "right": right,
                "recall": _percent(right / count) if count else "no pictures",
                "confused": f"{_cell(record.label_names[other])} ({n})" if n else "",
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
    """Say what the data shows of where the network is weak."""
    names, limits = record.label_names, []
    counts = record.dataset.train_counts
    if counts is not None:
        rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < max(FEW, np.mean(counts) / 4)]
        if rare:
            listed = ", ".join(f"{_cell(names[i])} ({counts[i]})" for i in rare[:8])
            more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            limits.append(f"Few pictures to learn from: {listed}{more}.")
    few = [i for i, count in enumerate(record.evaluation.measured) if count < 10]
    if few:
        listed = ", ".join(_cell(names[i]) for i in few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
        limits.append(f"Fewer than 10 pictures to evaluate on, so that their recall says little: {listed}.")
    mistakes = [(-n, a, b) for a, row in enumerate(record.evaluation.confusion) for b, n in row if a != b]
    said = [f"{_cell(names[a])} for {_cell(names[b])} ({_times(-n)})" for n, a, b in heapq.nsmallest(3, mistakes)]
    if said:
        limits.append(f"Most often it takes {', '.join(said)}.")
    limits.append(
        "The figures hold for pictures like those of the evaluation split; how it does on others, and on what is of "
        "none of its classes, was not measured."
    )
    return limits


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _dataset_link(record: RunRecord) -> str:
    dataset = record.dataset
    if dataset.hub_id:
        return f"[{dataset.hub_id}](https://huggingface.co/datasets/{dataset.hub_id})"
    if dataset.id == "digits":
        return "scikit-learn's bundled handwritten digits (1,797 pictures of 8 x 8 pixels)"
    return f"`{dataset.id}`, a local dataset"


def _split_name(record: RunRecord) -> str:
    dataset = record.dataset
    if dataset.eval_split is not None:
        return f"split `{dataset.eval_split}`"
    return f"held out of `{dataset.train_split}`, stratified, seed {record.config['split_seed']}"


def _class_list(names: list[str], most: int = 12) -> str:
    shown = ", ".join(_cell(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _hardware(hardware: HardwareFacts) -> str:
    precision = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}[hardware.mixed_precision]
    threads = f", {hardware.threads} threads" if hardware.device == "cpu" else ""
    return f"{hardware.name} ({hardware.device}{threads}, {precision})"
