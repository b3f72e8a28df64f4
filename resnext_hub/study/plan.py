"""Resolve a request into the members, runs and cost of a study, and keep it in `study.yaml`."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from resnext_hub.data.sources import dataset_name, is_url
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.data.transforms import resolve_input
from resnext_hub.errors import RequestError, setting
from resnext_hub.files import write_atomic, write_json
from resnext_hub.machine import cores, device_type
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.lookup import find_model
from resnext_hub.processes.launcher import processes
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.settings import Range, check_fields
from resnext_hub.study.members import KINDS, BaseConfig, Design, Member, design
from resnext_hub.text import listing, printable
from resnext_hub.training.config import TrainConfig, flat_fields
from resnext_hub.yaml_files import read_yaml

STUDY_VERSION = 1
"""Format version of study.yaml."""

STUDIES = Path("studies")
"""Folder of study folders, if `study_dir` is not given."""

RECIPE = "study"
"""The recipe of members, unless another one is named."""

_MOST_JOBS = 4
"""Most runs in parallel by default; each takes about a gigabyte of memory."""

OWN = frozenset(
    {"model", "pretrained", "seed", "threads", "push_to_hub", "push_checkpoints", "repo_id", "license", "private"}
    | {"folds", "fold"}
)
"""Settings of training that a study chooses itself."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Runs of the study."""

    seeds: Annotated[int, Range(1, 1000)] = 5
    """Number of runs per member, with the seeds 0, 1, 2 and so on; to extend an existing study, increase this number
    and rerun the command."""
    jobs: Annotated[int, Range(1, 256)] | None = None
    """Number of runs to train in parallel, which share the CPU cores; if not given, 1 with an accelerator, otherwise
    one per core, up to 4."""
    retries: Annotated[int, Range(0, 100)] = 1
    """Number of further attempts for a run that fails; each attempt resumes from the last checkpoint of the run."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class StudyFolder:
    """Paths in the folder of a study; nothing is created or checked."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """What the study compares, in YAML."""
        return self.path / "study.yaml"

    @property
    def runs(self) -> Path:
        """Folder of run folders."""
        return self.path / "runs"

    @property
    def report(self) -> Path:
        """Results in JSON."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """Results in Markdown."""
        return self.path / "README.md"

    @property
    def plots(self) -> Path:
        """Folder of plots."""
        return self.path / "plots"

    @property
    def speed(self) -> Path:
        """Measured inference speed, in JSON."""
        return self.path / "speed.json"

    def lock(self, shard: "Shard") -> Path:
        """File that a process locks while it runs a shard."""
        return self.path / f".lock-{shard.index}-of-{shard.count}"

    @property
    def members(self) -> Path:
        """Folder of a folder with config.json for the architecture of each member."""
        return self.path / "members"

    def member(self, member: Member) -> Path:
        """Folder with the config.json of a member's architecture."""
        return self.members / member.slug

    def run(self, slug: str, seed: int) -> RunFolder:
        """Run folder of a member, by its slug, and a seed."""
        return RunFolder(self.runs / f"{slug}-seed{seed}")

    def log(self, member: Member, seed: int) -> Path:
        """Output of the run's process."""
        return self.runs / f"{member.slug}-seed{seed}.log"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a study's runs."""

    index: int = 1
    """From 1 to `count`."""
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Study:
    """A resolved study."""

    kind: str
    base: BaseConfig
    cardinalities: tuple[int, ...]
    config: StudyConfig
    training: dict[str, Any]
    """Flat settings of every run, except model and seed."""
    splits: Splits
    input: InputConfig
    design: Design
    folder: StudyFolder
    jobs: int
    """Runs to train in parallel."""

    @property
    def threads(self) -> int:
        """CPU threads of each run."""
        return max(1, cores() // self.jobs)

    @property
    def train_config(self) -> TrainConfig:
        """The settings of every run, typed; model and seed are the defaults."""
        return TrainConfig.from_flat(self.training)

    @property
    def runs(self) -> list[tuple[Member, int]]:
        """All runs, seed by seed, so that an interrupted study has complete seeds."""
        return [(member, seed) for seed in range(self.config.seeds) for member in self.design.members]

    def part(self, shard: Shard) -> list[tuple[Member, int]]:
        """Return the runs of a shard."""
        return self.runs[shard.index - 1 :: shard.count]

    def run_settings(self, member: Member, seed: int) -> dict[str, Any]:
        """Return the flat settings of a run."""
        return self.training | {
            "model": f"local-dir:{self.folder.member(member).absolute()}",
            "pretrained": False,
            "seed": seed,
            "threads": str(self.threads),
        }

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a study is resumed or merged; local paths are reduced to names."""
        training = {
            name: value
            for name, value in self.train_config.to_flat().items()
            if flat_fields()[name].resume != "free" and name not in OWN
        }
        if self.splits.hub_id is None:
            training["dataset"] = printable(self.splits.dataset_id)
        return {
            "kind": self.kind,
            **dataclasses.asdict(self.base),
            "fingerprint": self.splits.fingerprint,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in training.items()},
        }


def plan_study(
    kind: str,
    base: BaseConfig,
    config: StudyConfig,
    asked: Mapping[str, Any],
    *,
    cardinalities: tuple[int, ...] = (1, 2, 4, 8, 32),
    recipe: str | None = None,
    file: Path | None = None,
    study_dir: Path | None = None,
) -> Study:
    """Validate a request and resolve it into a study; nothing is written.

    Args:
        kind: One of `KINDS`.
        base: The base architecture.
        config: Seeds and processes.
        asked: Flat settings of training that the user gave.
        cardinalities: Numbers of groups for the kind `cardinality`, the baseline first.
        recipe: Name of the recipe of members; `study` if not given.
        file: A YAML file of settings; it overrides the recipe.
        study_dir: The study folder; `studies/{kind}-{dataset}` if not given.

    Raises:
        RequestError: If the request is invalid, or the folder contains a different study.
    """
    if processes() > 1:
        raise RequestError("a study launches its own runs; run it without torchrun or accelerate launch")
    if len(set(cardinalities)) < 2 and kind == "cardinality":
        raise RequestError(f"{setting('cardinalities')}: expected at least two different numbers of groups")
    settings, _ = merge_settings(asked, recipe or RECIPE, file)
    if taken := sorted(OWN & settings.keys() - {"model", "pretrained"}):
        raise RequestError(f"a study chooses {listing(taken)} itself; omit {'it' if len(taken) == 1 else 'them'}")
    settings = {name: value for name, value in settings.items() if name not in OWN}
    training = TrainConfig.from_flat(settings)
    splits = load_splits(training.data)
    if splits.is_multi_label:
        raise RequestError(
            f"{setting('dataset', dataset_name(training.data))} has several labels per image, but a study compares "
            "accuracies; choose a dataset with one label per image"
        )
    if is_url(training.data.dataset):
        settings["dataset"] = splits.found.dataset  # without secrets; the runs use the copy in the cache
        training = TrainConfig.from_flat(settings)
    if splits.revision is not None:
        settings["dataset_revision"] = splits.revision
    architecture = find_model(base.variant().name, False)
    input = resolve_input(training.transform, architecture.pretrained_cfg)
    slug = re.sub(r"[^\w.-]+", "_", dataset_name(training.data)).strip("_.")
    study = Study(
        kind=kind,
        base=base,
        cardinalities=cardinalities,
        config=config,
        training=settings,
        splits=splits,
        input=input,
        design=design(kind, base, cardinalities, input.image_size, len(splits.label_names), input.channels),
        folder=StudyFolder(study_dir or STUDIES / f"{kind}-{slug}"),
        jobs=config.jobs or _jobs(),
    )
    _require_same(study)
    return study


def _jobs() -> int:
    """Return how many runs train in parallel by default: on a CPU, small models gain little from more threads."""
    return min(_MOST_JOBS, cores()) if device_type() == "cpu" else 1


def claim_folder(study: Study) -> None:
    """Write `study.yaml` and the architectures of the members.

    Raises:
        RequestError: If the folder cannot be written, or a run is refused before training, such as for its image size.
    """
    folder = study.folder
    try:
        folder.runs.mkdir(parents=True, exist_ok=True)
        for member in study.design.members:
            write_architecture(study, member, folder.member(member))
        content = {
            "format_version": STUDY_VERSION,
            "seeds": study.config.seeds,
            "cardinalities": list(study.cardinalities),
            **study.identity(),
        }
        write_atomic(folder.config, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise RequestError(
            f"{printable(folder)} cannot be written to: {error.strerror}; choose another {setting('study_dir')}"
        ) from error
    for member, seed in study.runs:  # all have the same settings, so one is enough
        run = folder.run(member.slug, seed)
        if not os.path.lexists(run.record):
            settings = study.run_settings(member, seed)
            prepare(settings, asked=settings, output_dir=run.path)
            return


def write_architecture(study: Study, member: Member, folder: Path) -> None:
    """Write the config.json of a member, from which `local-dir:folder` builds it."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrained_cfg = find_model(member.variant.name, False).pretrained_cfg
    facts = InputConfig.resolve(pretrained_cfg, in_chans=study.input.channels).to_timm()
    write_json(
        folder / "config.json",
        {
            "architecture": member.variant.name,
            "num_classes": len(study.splits.label_names),
            "model_args": member.variant.model_args,
            "pretrained_cfg": {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()},
        },
    )


def _require_same(study: Study) -> None:
    """Raise RequestError if the folder contains a different study, or other files."""
    folder = study.folder
    way_out = f"choose another {setting('study_dir')}"
    if not os.path.lexists(folder.config):
        if folder.path.is_dir() and any(entry.name[0] != "." for entry in folder.path.iterdir()):
            raise RequestError(f"{printable(folder)} contains other files but no study; {way_out}")
        return
    before = read_study(folder)
    now = study.identity()
    differing = [
        f"{setting(name)} was {printable(before.get(name))} and is now {printable(value)}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differing:
        raise RequestError(f"{printable(folder)} contains a different study: {'; '.join(differing)}; {way_out}")


def read_study(folder: StudyFolder, flag: str = "study_dir") -> dict[str, Any]:
    """Return the content of study.yaml.

    Args:
        folder: The study folder.
        flag: The setting that named the folder, for errors.

    Raises:
        RequestError: If it cannot be read, or has another format version.
    """
    content = read_yaml(folder.config, f"restore the file, or choose another {setting(flag)}")
    version = content.get("format_version")
    if version != STUDY_VERSION or isinstance(version, bool):
        raise RequestError(
            f"{printable(folder.config)} has format version {printable(version)[:40]}; this version of resnext-hub "
            f"reads version {STUDY_VERSION}; update resnext-hub, or choose another {setting(flag)}"
        )
    if content.get("kind") not in KINDS:
        raise RequestError(
            f"{printable(folder.config)} is damaged: kind is {printable(content.get('kind'))[:40]}; expected one of "
            f"{', '.join(KINDS)}; restore the file, or choose another {setting(flag)}"
        )
    return content
