"""Results of a study: what its runs recorded, and what follows from it."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resnext_hub.errors import RunError
from resnext_hub.record import RunRecord
from resnext_hub.study.members import Member
from resnext_hub.study.plan import Study
from resnext_hub.study.runner import Failure, finished_record
from resnext_hub.study.statistics import Difference, Summary, compare, summarize
from resnext_hub.text import printable


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """The finished runs of a member."""

    member: Member
    records: Mapping[int, RunRecord]
    """By seed."""
    inference: float | None = None
    """Measured throughput of inference in images/s."""

    @property
    def accuracy(self) -> dict[int, float]:
        """Final accuracy by seed, in percent."""
        return {seed: final_accuracy(record) for seed, record in self.records.items()}

    @property
    def summary(self) -> Summary | None:
        """Mean and standard deviation of the final accuracy."""
        return summarize(self.accuracy)

    @property
    def training(self) -> float | None:
        """Measured throughput of training in images/s: median over the log lines of all runs."""
        speeds = [
            line["images_per_second"]
            for record in self.records.values()
            for line in record.history
            if "images_per_second" in line
        ]
        return statistics.median(speeds) if speeds else None


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Everything that a report shows."""

    study: Study
    members: tuple[MemberResult, ...]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]
    """Names of the runs that are not finished."""
    failures: tuple[Failure, ...]

    @property
    def first_record(self) -> RunRecord | None:
        """Any record; all state the same dataset and settings."""
        return next((record for result in self.members for record in result.records.values()), None)

    def member(self, name: str) -> MemberResult:
        """Return the results of a member by its name."""
        return next(result for result in self.members if result.member.name == name)


def final_accuracy(record: RunRecord) -> float:
    """Return the accuracy at the last step of a run, in percent.

    The accuracy of the published weights is the largest of all evaluations, chosen on the same images, so a comparison
    of architectures by it would compare the luck of a choice as well.
    """
    *_, last = (line for line in record.history if "eval_top1" in line)
    return 100 * float(last["eval_top1"])


def collect(
    study: Study, failures: tuple[Failure, ...] = (), inference: Mapping[str, float] | None = None
) -> StudyResult:
    """Read the records of a study, and compare its members.

    Args:
        study: The study.
        failures: Runs that failed in this process.
        inference: Measured throughput by member.

    Raises:
        RunError: If two runs were trained on different images or with different settings.
    """
    members, missing = [], []
    for member in study.design.members:
        found = {}
        for seed in range(study.config.seeds):
            folder = study.folder.run(member.slug, seed)
            record = finished_record(folder)
            if record is None:
                missing.append(folder.path.name)
            else:
                found[seed] = record
        members.append(MemberResult(member=member, records=found, inference=(inference or {}).get(member.name)))
    _require_comparable(study, members)
    by_name = {result.member.name: result for result in members}
    record = next((r for result in members for r in result.records.values()), None)
    differences = tuple(
        compare(
            name,
            baseline,
            by_name[name].accuracy,
            by_name[baseline].accuracy,
            comparisons=len(study.design.comparisons),
            resolution=0.0 if record is None else 100 / record.evaluation.count,
        )
        for name, baseline in study.design.comparisons
    )
    return StudyResult(
        study=study, members=tuple(members), differences=differences, missing=tuple(missing), failures=failures
    )


def _require_comparable(study: Study, members: list[MemberResult]) -> None:
    """Raise RunError if runs differ in more than architecture and seed."""
    identity = study.identity()
    remedy = "remove it, and rerun the study"
    for result in members:
        for seed, record in result.records.items():
            where = printable(study.folder.run(result.member.slug, seed))
            if record.dataset.fingerprint != study.splits.fingerprint:
                raise RunError(f"{where} was trained on different images from the rest of the study; {remedy}")
            if record.config["seed"] != seed or record.model.parameters != result.member.cost.parameters:
                raise RunError(f"{where} does not match its folder name (seed or architecture differs); {remedy}")
            differing = [
                name
                for name, value in record.config.items()
                if name in identity and name not in _RESOLVED and identity[name] not in (None, value)
            ]
            if differing:
                raise RunError(f"{where} was trained with different settings ({', '.join(differing)}); {remedy}")


_RESOLVED = frozenset({"dataset", "lr", "decoder"})
"""Settings that a run resolves; the fingerprint stands for the dataset."""


def to_json(result: StudyResult, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results as plain values."""
    study = result.study
    record = result.first_record
    return {
        "format_version": 1,
        "kind": study.kind,
        "base": dataclasses.asdict(study.base),
        "training": {k: v for k, v in study.identity().items() if k not in dataclasses.asdict(study.base)},
        "dataset": None if record is None else dataclasses.asdict(record.dataset),
        "image_size": study.input.image_size,
        "machine": dict(machine),
        "members": [_member_json(study, member) for member in result.members],
        "comparisons": [dataclasses.asdict(d) | {"verdict": d.verdict} for d in result.differences],
        "missing": list(result.missing),
        "failures": [dataclasses.asdict(failure) for failure in result.failures],
    }


def _member_json(study: Study, result: MemberResult) -> dict[str, Any]:
    member, summary = result.member, result.summary
    return member.facts() | {
        "deviation": member.deviation(study.base.match),
        "training_images_per_second": result.training,
        "inference_images_per_second": result.inference,
        "accuracy_mean": None if summary is None else summary.mean,
        "accuracy_sd": None if summary is None else summary.sd,
        "runs": [
            {
                "seed": seed,
                "folder": f"runs/{study.folder.run(member.slug, seed).path.name}",
                "accuracy": final_accuracy(record),
                "weights_sha256": record.model.weights_sha256,
                "wall_seconds": record.wall_seconds,
            }
            for seed, record in sorted(result.records.items())
        ],
    }
