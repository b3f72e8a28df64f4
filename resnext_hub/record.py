"""Every fact about a run, in one JSON file that training writes and everything after it reads."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnext_hub.errors import RequestError
from resnext_hub.files import write_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The network that was trained."""

    requested: str
    """What was asked for: a name, `hf-hub:…`, or `local-dir:` with the folder's own name."""
    architecture: str
    """timm architecture that builds the network (needs this package only where stock timm has no such network)."""
    model_args: dict[str, Any]
    """Arguments that differ from the architecture's own."""
    needs_plugin: bool
    parameters: int
    variant: str | None
    """Name in this package, and its template such as 32x4d, if the network is of the family."""
    template: str | None
    input: dict[str, Any]
    """input_size, crop_pct, interpolation, mean, std, crop_mode: the evaluation's preprocessing in timm's keys."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class BaseModelFacts:
    """The weights that training started from."""

    id: str
    hub_id: str | None
    """Repository on the Hub, without a revision; None for a local folder."""
    license: str | None


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """The pictures."""

    id: str
    hub_id: str | None
    revision: str | None
    fingerprint: str
    train_split: str
    eval_split: str | None
    """None if the evaluation split was cut from the training split."""
    train_count: int | None
    """None for a stream that does not state it."""
    eval_count: int
    train_counts: list[int] | None
    """Pictures by class; None for a stream."""
    eval_counts: list[int] | None


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """How the published weights do on the evaluation split."""

    step: int
    epoch: float
    correct: int
    count: int
    top1: float
    loss: float
    top5: float | None
    """None where there are so few classes that five guesses say little."""
    macro_f1: float
    calibration_error: float
    """Expected calibration error over 15 bins, 0 to 1."""
    batch_size: int
    """Shape of every forward pass; float32 logits depend on it in their last bits."""
    confusion: list[list[int]]
    """Rows are true classes, columns predicted ones."""


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """What the published weights say of one evaluation sample."""

    index: int
    """Place in the evaluation split."""
    label: str
    output: list[tuple[str, float]]
    """The most probable classes with their probabilities, the first one first."""


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
    steps: int
    epochs: float
    """Passes over the training split."""
    evaluation: EvaluationFacts
    sample: SampleFacts
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    """device, threads, mixed_precision, and the processor's or accelerator's name."""
    processes: int
    git_commit: str | None
    wall_seconds: float
    resumes: int
    skipped_steps: int
    """Steps whose gradients overflowed in fp16, so that the weights were left as they were."""
    decoders: list[str] = field(default_factory=list)
    """What decoded the pictures to train on, in the order of use: several if a run was told to go on with another."""
    broken_pictures: list[dict[str, str]] = field(default_factory=list)
    merged_groups: dict[str, int] = field(default_factory=dict)
    """How many neighbouring groups of a grouped convolution were computed as one in training, by the layer's name."""

    def save(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Read a record.

        Raises:
            RequestError: If there is none, or it is of another format.
        """
        if not path.is_file():
            folder = path.parent
            if not folder.is_dir():
                raise RequestError(f"there is no folder {folder}")
            if (folder / "config.yaml").is_file():
                raise RequestError(f"the run in {folder} is not finished; its training command goes on with it")
            hint = f"; did you mean {folder.parent}?" if (folder.parent / "record.json").is_file() else ""
            raise RequestError(f"{folder} holds no record.json: it is not the folder of a run{hint}")
        content = json.loads(path.read_text())
        if content.get("format_version") != FORMAT_VERSION:
            raise RequestError(
                f"{path} is of format {content.get('format_version')}; this version reads {FORMAT_VERSION}"
            )
        base = content["base_model"]
        return cls(
            **content
            | {
                "model": ModelFacts(**content["model"]),
                "base_model": None if base is None else BaseModelFacts(**base),
                "dataset": DatasetFacts(**content["dataset"]),
                "evaluation": EvaluationFacts(**content["evaluation"]),
                "sample": SampleFacts(
                    **content["sample"] | {"output": [(name, value) for name, value in content["sample"]["output"]]}
                ),
            }
        )
