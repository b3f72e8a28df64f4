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
        "The paper's Table 3 (ImageNet, 50 layers, top-1 error): 1x64d 23.9 %, 2x40d 23.0 %, 4x24d 22.6 %, 8x14d 22.3 "
        "%, 32x4d 22.2 %; 101 layers: 22.0, 21.7, 21.4, 21.3, 21.2 %."
    ),
    "doubling": (
        "The paper's Table 4 (ImageNet, top-1 error): ResNet-101 22.0 %; twice the cost by depth (ResNet-200) 21.7 %, "
        "by width (1x100d) 21.3 %, by cardinality 20.7 % (2x64d) and 20.4 % (64x4d)."
    ),
    "shortcuts": (
        "The paper's section 5.1 (ImageNet, top-1 error): ResNet-50 23.9 % with and 31.2 % without shortcuts; "
        "ResNeXt-50 22.2 % and 26.1 %."
    ),
    "resnet": (
        "The paper's Figure 5 (ImageNet): ResNeXt-50 has a lower training error than ResNet-50 of equal cost "
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
    parts = [f"# {TITLES[study.kind]}", f"{KINDS[study.kind][0].upper()}{KINDS[study.kind][1:]}."]
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
    return (
        f"Dataset {data.id}: {data.train_count:,} training images, accuracy on {record.evaluation.count:,} images of "
        f"{f'the `{data.eval_split}` split' if data.eval_split else 'a held-out split'}; {study.input.image_size} px. "
        f"{config['epochs']:g} epochs, batch {config['batch_size']}, {config['optimizer']}, learning rate "
        f"{config['lr']:g}. Base: {study.base.depth} layers, {study.base.stem} stem, width scale "
        f"{study.base.width_scale:g}; {match} of each member matched to within 2 % of the target. Runs with the "
        "same seed have the same data order, the same augmentation, and the same initial values wherever shapes agree."
    )


def _meaning(result: StudyResult) -> str:
    count = len(result.differences)
    level = f"{100 * CONFIDENCE:.0f} % confidence intervals"
    intervals = f"{level} (paired t)"
    if count > 1:
        intervals = f"simultaneous {level} (paired t, Bonferroni-corrected for {count} comparisons)"
    return (
        "Differences are in percentage points of the accuracy at the last step, paired by seed; intervals are "
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
    beside = f", {study.jobs} runs in parallel" if study.jobs > 1 else ""
    return (
        f"Accuracy: mean ± sample standard deviation over the seeds. Multiply-adds and activations are per image at "
        f"{study.input.image_size} px. Training: median throughput of the runs, with groups merged where that was "
        f"faster{beside}. Inference: eager float32, batch {study.train_config.eval_batch_size}. "
        f"{machine['processor']}, {study.threads} {'thread' if study.threads == 1 else 'threads'} per run; {packages}."
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
