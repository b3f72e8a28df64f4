"""The report of a study in Markdown, JSON and plots."""

from typing import Any

from resnext_hub.files import new_folder, write_atomic, write_json
from resnext_hub.plots.study import STUDY_PLOTS, Curve, Point, write_study_plots
from resnext_hub.record import RunRecord
from resnext_hub.study.members import KINDS
from resnext_hub.study.results import MemberResult, StudyResult, final_accuracy, to_json
from resnext_hub.study.speed import machine_facts
from resnext_hub.study.statistics import CONFIDENCE, Difference, half_width, sentence

PAPER = {
    "cardinality": (
        "In the paper's Table 3 (ImageNet), the top-1 error with 50 layers is 23.9 % for 1x64d, 23.0 % for 2x40d, "
        "22.6 % for 4x24d, 22.3 % for 8x14d and 22.2 % for 32x4d. With 101 layers, it is 22.0, 21.7, 21.4, 21.3 and "
        "21.2 %, in the same order."
    ),
    "doubling": (
        "In the paper's Table 4 (ImageNet), the top-1 error of ResNet-101 is 22.0 %. At twice the cost, it is 21.7 % "
        "with more depth (ResNet-200), 21.3 % with more width (1x100d), and 20.7 % (2x64d) or 20.4 % (64x4d) with a "
        "higher cardinality."
    ),
    "shortcuts": (
        "In the paper's section 5.1 (ImageNet), the top-1 error of ResNet-50 is 23.9 % with shortcuts and 31.2 % "
        "without them; that of ResNeXt-50 is 22.2 % with shortcuts and 26.1 % without them."
    ),
    "resnet": (
        "In the paper's Figure 5 (ImageNet), ResNeXt-50 has a lower training error than a ResNet-50 of equal cost "
        "throughout training, and a lower validation error at the end (22.2 % vs. 23.9 %)."
    ),
}
"""What the paper reports for each kind of study (arXiv 1611.05431)."""

TITLES = {
    "cardinality": "Cardinality at equal cost",
    "doubling": "Twice the cost: depth, width or cardinality",
    "shortcuts": "Residual connections",
    "resnet": "ResNet vs. ResNeXt",
}
"""Headings of the reports."""


def write_report(result: StudyResult) -> None:
    """Write README.md, report.json and the plots of a study."""
    folder = result.study.folder
    with new_folder(folder.plots) as aside:
        written = write_study_plots(aside, _points(result), _curves(result), TITLES[result.study.kind])
    machine = machine_facts()
    write_json(folder.report, to_json(result, machine))
    write_atomic(folder.page, markdown(result, machine, written))


def markdown(result: StudyResult, machine: dict[str, Any], plots: list[str]) -> str:
    """Return the report as Markdown."""
    study, record = result.study, result.first_record
    parts = [f"# {TITLES[study.kind]}", f"This study compares {KINDS[study.kind]}."]
    if record is not None:
        parts.append(_conditions(result, record))
    parts += ["## Verdict", *[f"- {sentence(difference)}" for difference in result.differences]]
    parts.append(_meaning(result))
    if result.missing or result.failures:
        parts += ["## Missing runs", *_missing(result)]
    parts += ["## Results", _table(result), _table_notes(result, machine)]
    parts += [f"![{STUDY_PLOTS[name]}](plots/{name})" for name in plots]
    parts += ["## The paper", PAPER[study.kind], "## Runs", _runs(result)]
    text = "\n\n".join(parts).replace("\n\n- ", "\n- ")
    return (
        text.replace("## Verdict\n- ", "## Verdict\n\n- ").replace("## Missing runs\n- ", "## Missing runs\n\n- ")
        + "\n"
    )


def _conditions(result: StudyResult, record: RunRecord) -> str:
    study, data, config = result.study, record.dataset, record.config
    match = "parameters" if study.base.match == "parameters" else "multiply-adds"
    split = f"of the `{data.eval_split}` split" if data.eval_split else "of a held-out split"
    return (
        f"Each member is trained on {data.train_count:,} images of {data.id} at {study.input.image_size} px for "
        f"{config['epochs']:g} epochs, with the {config['optimizer']} optimizer, a batch size of "
        f"{config['batch_size']} and a learning rate of {config['lr']:g}. Accuracy is measured on "
        f"{record.evaluation.count:,} images {split}. The base has {study.base.depth} layers, the {study.base.stem} "
        f"stem and a width scale of {study.base.width_scale:g}; the {match} of each member match the target to within "
        "2 %. Runs with the same seed have the same data order, the same augmentation, and the same initial "
        "values wherever shapes match."
    )


def _meaning(result: StudyResult) -> str:
    count = len(result.differences)
    level = f"{100 * CONFIDENCE:.0f} % confidence intervals"
    intervals = f"{level} (paired t)"
    if count > 1:
        intervals = f"simultaneous {level} (paired t, Bonferroni-corrected for {count} comparisons)"
    return (
        "Differences in accuracy at the last step are in percentage points and paired by seed; intervals are "
        f"{intervals}. They reflect only seed-to-seed variation on this dataset, split and recipe."
    )


def _missing(result: StudyResult) -> list[str]:
    failed = {failure.run: failure for failure in result.failures}
    return [
        f"- `{name}`: {failed[name].reason} ({failed[name].tries})" if name in failed else f"- `{name}`"
        for name in result.missing
    ]


def _table(result: StudyResult) -> str:
    head = (
        "member|groups x widths|M parameters|M MACs|M activations|cost vs. target|training images/s|inference images/s"
        "|accuracy %|seeds|difference from the baseline"
    )
    names = head.split("|")
    lines = [names, ["---", "---", *["---:"] * 8, "---"]]
    first: dict[str, Difference] = {}
    for difference in result.differences:
        first.setdefault(difference.member, difference)
    lines += [_row(result, member, first.get(member.member.name)) for member in result.members]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(result: StudyResult, found: MemberResult, difference: Difference | None) -> list[str]:
    member, summary = found.member, found.summary
    widths = ", ".join(map(str, member.variant.stage_group_widths))
    accuracy = "" if summary is None else f"{summary.mean:.2f}" + ("" if summary.sd is None else f" ± {summary.sd:.2f}")
    shown = ""
    if difference is not None and difference.mean is not None:
        shown = f"{difference.mean:+.2f}"
        if difference.low is not None:
            shown += f" ({difference.low:+.2f} to {difference.high:+.2f})"
        shown += f" from {difference.baseline}"
    return [
        member.name,
        f"{member.variant.cardinality} x ({widths})",
        f"{member.cost.parameters / 1e6:.3f}",
        f"{member.cost.macs / 1e6:.1f}",
        f"{member.cost.activations / 1e6:.2f}",
        f"{100 * member.deviation(result.study.base.match):+.1f} %",
        "" if found.training is None else f"{found.training:.0f}",
        "" if found.inference is None else f"{found.inference:.0f}",
        accuracy,
        str(len(found.records)),
        shown,
    ]


def _table_notes(result: StudyResult, machine: dict[str, Any]) -> str:
    study = result.study
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    beside = f", and with {study.jobs} runs in parallel" if study.jobs > 1 else ""
    return (
        f"Accuracy is the mean ± sample standard deviation over the seeds. Multiply-adds and activations are per image "
        f"at {study.input.image_size} px. Training throughput is the median over the runs, with groups merged where "
        f"that was faster{beside}. Inference throughput is measured in eager mode, in float32, with a batch size of "
        f"{study.train_config.eval_batch_size}. The speeds were measured on {machine['processor']} with "
        f"{study.threads} {'thread' if study.threads == 1 else 'threads'} per run and {packages}."
    )


def _runs(result: StudyResult) -> str:
    lines = [["run", "accuracy %", "wall time, s"], ["---", "---:", "---:"]]
    for found in result.members:
        for seed, record in sorted(found.records.items()):
            name = result.study.folder.run(found.member.slug, seed).path.name
            link = f"[{name}](runs/{name}/model/README.md)"
            lines.append([link, f"{final_accuracy(record):.2f}", f"{record.wall_seconds:.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _points(result: StudyResult) -> list[Point]:
    """Return each member's mean accuracy with an interval of its own, against cardinality and measured time."""
    points = []
    for found in result.members:
        summary = found.summary
        if summary is None:
            continue
        half = None if summary.sd is None else half_width(summary.sd, len(summary.seeds))
        seconds = [record.wall_seconds for record in found.records.values()]
        points.append(
            Point(
                name=found.member.name,
                cardinality=found.member.variant.cardinality,
                accuracy=summary.mean,
                half_width=half,
                minutes=sum(seconds) / len(seconds) / 60,
            )
        )
    return points


def _curves(result: StudyResult) -> list[Curve]:
    return [
        Curve.of(found.member.name, [record.history for _, record in sorted(found.records.items())])
        for found in result.members
        if found.records
    ]
