"""`resnext-hub study`: compare cardinality, width and depth at controlled cost."""

import argparse
from typing import Any

from resnext_hub.cli.output import table, write
from resnext_hub.cli.parser import add_config_flags, count, existing_path, new_path
from resnext_hub.errors import RunError
from resnext_hub.settings import check_value, shown
from resnext_hub.text import listing, printable
from resnext_hub.training.config import BATCH, fields_of, flat_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.runs.recipes import RECIPES
    from resnext_hub.study.members import KINDS, BaseConfig
    from resnext_hub.study.plan import OWN, RECIPE, StudyConfig

    kinds = parser.add_subparsers(title="what to compare", required=True, dest="kind", metavar="KIND")
    for kind, text in KINDS.items():
        about = (
            f"{text[0].upper()}{text[1:]}. From the Training group onward, the defaults are those of `train`; the "
            f"recipe (default: {RECIPE}) overrides them."
        )
        own = kinds.add_parser(kind, help=text, description=about)
        group = own.add_argument_group("Study")
        group.add_argument(
            "--study-dir", type=new_path, metavar="DIR", help="study folder (default: studies/KIND-DATASET)"
        )
        group.add_argument(
            "--dry-run",
            action="store_true",
            help="print the members, their cost and the expected time, and exit without training",
        )
        group.add_argument(
            "--shard",
            type=_shard,
            metavar="I/N",
            help="divide the runs into N shards and train only the I-th one, for example to use several machines",
        )
        group.add_argument(
            "--merge",
            nargs="+",
            type=existing_path,
            metavar="DIR",
            help="copy finished runs from other study folders (shards, or studies that share members)",
        )
        group.add_argument("--recipe", help=f"recipe for the runs: {', '.join(RECIPES)} (default: {RECIPE})")
        group.add_argument("--config", type=existing_path, metavar="FILE", help="YAML file with settings for the runs")
        if kind == "cardinality":
            group.add_argument(
                "--cardinalities",
                nargs="+",
                type=count(BATCH),
                metavar="C",
                default=[1, 2, 4, 8, 32],
                help="numbers of groups, the baseline first (default: 1 2 4 8 32); to extend an existing study, rerun "
                "the command with additional numbers",
            )
        training = {name: field for name, field in flat_fields().items() if name not in OWN}
        add_config_flags(own, fields_of(StudyConfig) | fields_of(BaseConfig) | training)


def run(options: argparse.Namespace) -> None:
    """Train the members that are not finished, write the report, and print the verdict.

    Raises:
        RunError: If a run of this shard failed.
    """
    from resnext_hub.study.members import BaseConfig
    from resnext_hub.study.merge import take_over
    from resnext_hub.study.plan import Shard, StudyConfig, claim_folder, plan_study
    from resnext_hub.study.report import write_report
    from resnext_hub.study.results import collect
    from resnext_hub.study.runner import train_runs
    from resnext_hub.study.speed import inference_speed
    from resnext_hub.study.statistics import sentence

    given = vars(options)
    study = plan_study(
        options.kind,
        BaseConfig(**_values(BaseConfig, given)),
        StudyConfig(**_values(StudyConfig, given)),
        {name: value for name, value in given.items() if name in flat_fields()},
        cardinalities=tuple(given.get("cardinalities", ())),
        recipe=options.recipe,
        file=options.config,
        study_dir=options.study_dir,
    )
    if options.dry_run:
        _print_plan(study)
        return
    failures = []
    if options.merge:
        take_over(study, options.merge)
    else:
        claim_folder(study)
        failures = train_runs(study, options.shard or Shard())
    result = collect(study, tuple(failures), inference_speed(study))
    write_report(result)
    write("".join(f"{sentence(difference).replace('**', '')}\n" for difference in result.differences))
    write(f"report: {printable(study.folder.page)}\n")
    if failures:
        failed = listing([f"{failure.run} ({failure.reason})" for failure in failures], 3)
        raise RunError(
            f"{len(failures)} of {len(study.part(options.shard or Shard()))} runs failed: {failed}; the report "
            "covers the rest; rerun the same command to retry the failed runs"
        )
    if result.missing:
        unfinished = "1 run is" if len(result.missing) == 1 else f"{len(result.missing)} runs are"
        write(f"{unfinished} not finished; train the other shards, or rerun without --shard and --merge\n")


def _values(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    known = fields_of(kind)
    return {name: check_value(name, value, known[name].type) for name, value in given.items() if name in known}


def _shard(text: str) -> Any:
    from resnext_hub.study.plan import Shard

    index, slash, total = text.partition("/")
    if not (slash and index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total) <= BATCH):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected I/N, such as 1/2 for the first of two shards")
    return Shard(index=int(index), count=int(total))


def _print_plan(study: Any) -> None:
    """Print the members with their cost and the time that their runs should take."""
    from resnext_hub.study.speed import training_seconds

    seconds = training_seconds(study)
    rows = [
        ("member", "groups x widths", "M parameters", "M MACs", "M activations", "cost vs. target", "minutes per run")
    ]
    for member in study.design.members:
        rows.append(
            (
                member.name,
                f"{member.variant.cardinality} x {', '.join(map(str, member.variant.stage_group_widths))}",
                f"{member.cost.parameters / 1e6:.3f}",
                f"{member.cost.macs / 1e6:.1f}",
                f"{member.cost.activations / 1e6:.2f}",
                f"{100 * member.deviation(study.base.match):+.1f} %",
                f"{seconds[member.name] / 60:.1f}",
            )
        )
    write(table(rows))
    count = study.config.seeds
    total = count * sum(seconds.values()) / study.jobs / 60
    write(
        f"\n{len(study.runs)} runs ({count} {'seed' if count == 1 else 'seeds'}), about {total:.0f} minutes of "
        "training on this machine, excluding startup and evaluation\n"
    )
