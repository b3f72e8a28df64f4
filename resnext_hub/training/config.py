"""Everything that decides a run, composed of the configurations that stand beside their owners.

Flags and files are flat: every field has one name across all of them. `open` fields hold None until `resolve` in run.py
derives them; a resolved configuration written to a file repeats the run.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

from resnext_hub.data.config import DataConfig
from resnext_hub.data.loaders import LoaderConfig
from resnext_hub.data.transforms import IMAGE_SIZE, TransformConfig
from resnext_hub.errors import RequestError
from resnext_hub.machine import THREADS
from resnext_hub.settings import (
    FREE,
    FREE_PER_PROCESS,
    GROWS,
    SEEDS,
    Range,
    check_fields,
    check_value,
    did_you_mean,
    is_count,
    shown,
)
from resnext_hub.training.checkpoint import CheckpointConfig
from resnext_hub.training.optim import OptimConfig

STEPS = 1_000_000_000
BATCH = 1 << 20
WIDTHS = 1 << 16
"""Most steps, samples of a batch, and channels of a group that make sense anywhere."""

ALIASES = {
    "learning_rate": "lr",
    "initial_lr": "lr",
    "lr0": "lr",
    "wd": "weight_decay",
    "batch": "batch_size",
    "bs": "batch_size",
    "b": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "grad_accum_steps": "micro_batch_size",
    "validation_batch_size": "eval_batch_size",
    "imgsz": "image_size",
    "img_size": "image_size",
    "input_size": "image_size",
    "size": "image_size",
    "resolution": "image_size",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "num_steps": "max_steps",
    "max_train_steps": "max_steps",
    "iterations": "max_steps",
    "data": "dataset",
    "data_dir": "dataset",
    "data_path": "dataset",
    "dataset_name": "dataset",
    "arch": "model",
    "architecture": "model",
    "backbone": "model",
    "model_name": "model",
    "opt": "optimizer",
    "num_workers": "workers",
    "smoothing": "label_smoothing",
    "aa": "auto_augment",
    "reprob": "random_erasing",
    "drop": "drop_rate",
    "dropout": "drop_rate",
    "model_ema_decay": "ema",
    "ema_decay": "ema",
    "max_grad_norm": "clip_grad",
    "clip_grad_norm": "clip_grad",
    "amp": "mixed_precision",
    "precision": "mixed_precision",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "val_split": "eval_split",
    "validation_split": "eval_split",
    "test_split": "eval_split",
    "valid_split": "eval_split",
    "val_fraction": "eval_fraction",
    "torchcompile": "compile",
    "warmup": "warmup_epochs",
    "random_seed": "seed",
    "hub_model_id": "repo_id",
    "save_every": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "logging_steps": "log_every",
}
"""What other trainers call a setting, and its name here."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """What of a run goes to the Hub, and where."""

    push_to_hub: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Publish the model folder when the run is done."""
    push_checkpoints: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Keep the newest checkpoint on the repository's branch `checkpoints`, for --resume-from hub:owner/name."""
    repo_id: str | None = field(default=None, metadata=FREE_PER_PROCESS)
    """Repository on the Hub, owner/name; made if it is not there."""
    license: str | None = field(default=None, metadata=FREE_PER_PROCESS)
    """Licence of the weights, such as apache-2.0; asked for, never assumed."""
    private: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Make a new repository private."""

    def __post_init__(self) -> None:
        if (self.push_to_hub or self.push_checkpoints) and not self.repo_id:
            raise RequestError("--push-to-hub and --push-checkpoints need --repo-id, such as me/name")
        if self.push_to_hub and not self.license:
            raise RequestError("--push-to-hub needs --license, such as apache-2.0, mit or cc-by-nc-4.0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: str = "resnext_g32"
    """A name that timm knows, `hf-hub:owner/repo`, or `local-dir:folder`."""
    pretrained: bool | None = None
    """Start from released weights; if not given, yes for `hf-hub:` and `local-dir:`, no for a name (the recipe finetune
    says yes)."""
    drop_rate: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Dropout probability before the classifier."""
    drop_path: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability of dropping the last block's residual branch in training (stochastic depth)."""
    epochs: Annotated[float, Range(0, 1_000_000, above=True)] = field(default=30.0, metadata=GROWS)
    """Passes over the training split."""
    max_steps: Annotated[int, Range(1, STEPS)] | None = field(default=None, metadata=GROWS)
    """Optimizer steps, in place of the number that follows from the epochs."""
    batch_size: Annotated[int, Range(1, BATCH)] = 128
    """Global batch: samples of one optimizer step, over all processes."""
    micro_batch_size: Annotated[int, Range(1, BATCH)] | None = None
    """Samples that a process computes at once; its whole part of the batch if not given."""
    eval_batch_size: Annotated[int, Range(1, BATCH)] = 32
    """Fixed shape of evaluation passes, apart from the training batch."""
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Part of the target that is spread over all classes."""
    ema: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    """Decay of a moving average of the weights, such as 0.9998, which is then evaluated, kept and published."""
    seed: Annotated[int, Range(0, SEEDS)] = 0
    """Seed of weights, sample order and augmentation."""
    deterministic: bool | None = field(default=None, metadata=FREE)
    """Use deterministic algorithms only; if not given, yes on a CPU and no on an accelerator."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; auto is the launcher's, else bf16 where the device computes it fast."""
    merge_groups: str = field(default="auto", metadata=FREE)
    """Compute neighbouring groups of a grouped convolution as one wider group, which gives the same with fewer, larger
    products: `auto` where forward and backward pass are measured to be faster so, `off` nowhere, a number merges all to
    that width in channels, or the greatest below it."""
    compile: bool = field(default=False, metadata=FREE)
    """Compile forward and backward pass with torch.compile, which takes a minute or more at the start."""
    progressive_size: Annotated[int, Range(1, IMAGE_SIZE)] | None = None
    """Size in pixels at which training begins, to grow to the image size over three quarters of the run."""
    threads: str = field(default="auto", metadata=FREE_PER_PROCESS)
    """Computing threads of each process on a CPU; auto shares the cores out."""
    log_every: Annotated[int, Range(1, STEPS)] = field(default=10, metadata=FREE)
    """Steps between log lines."""
    eval_every: Annotated[int, Range(1, STEPS)] = 1
    """Epochs between evaluations; the last step is always evaluated."""
    log_samples: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Write samples-P.jsonl for each process: the indices of each step and a hash of their pixels."""
    data: DataConfig = field(default_factory=DataConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.merge_groups not in ("auto", "off") and not is_count(self.merge_groups, WIDTHS):
            raise RequestError(
                f"--merge-groups {shown(self.merge_groups)}: expected auto, off or a width in channels from 1 to "
                f"{WIDTHS:,}, such as 32"
            )
        if self.threads != "auto" and not is_count(self.threads, THREADS):
            raise RequestError(
                f"--threads {shown(self.threads)}: expected auto or a number of threads from 1 to {THREADS:,}"
            )

    def to_flat(self) -> dict[str, Any]:
        """Give every field by its one name; the inverse of `from_flat`."""
        flat: dict[str, Any] = {}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if dataclasses.is_dataclass(value):
                flat |= {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            else:
                flat[part.name] = value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Build a configuration from field names and values; what is not named keeps its default.

        Raises:
            RequestError: If a name is unknown or a value is of the wrong type or out of range.
        """
        known = flat_fields()
        for name in values:
            if name not in known:
                hint = did_you_mean(name.replace("-", "_"), known, ALIASES) or "; resnext-hub train --help lists them"
                raise RequestError(f"unknown setting {shown(name)}{hint}")
        checked = {name: check_value(name, value, known[name].type) for name, value in values.items()}
        own = {f.name: checked[f.name] for f in dataclasses.fields(cls) if f.name in checked}
        for part, kind in _parts(cls).items():
            mine = {f.name: checked[f.name] for f in dataclasses.fields(kind) if f.name in checked}
            own[part] = kind(**mine)
        return cls(**own)


def resumable_fields() -> frozenset[str]:
    """Return the settings that may change when a run is resumed.

    Another decoder gives slightly different pixels, so it has to be requested by its flag.
    """
    return frozenset(name for name, field in flat_fields().items() if field.resume == "free")


def growing_fields() -> frozenset[str]:
    """Return the settings that may only grow when a run is resumed."""
    return frozenset(name for name, field in flat_fields().items() if field.resume == "grows")


def process_fields() -> frozenset[str]:
    """Return the settings that may differ between the processes of a run."""
    return frozenset(name for name, field in flat_fields().items() if field.per_process)


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide the result, without places on this machine: the dataset has a fingerprint."""
    settings = config.to_flat()
    left_out = resumable_fields() | growing_fields() | {"dataset"}
    if settings["model"].startswith("local-dir:"):
        left_out = left_out | {"model"}
    return {name: value for name, value in settings.items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class FlatField:
    """A field by its one name: its type, default, and the sentence under it."""

    name: str
    type: Any
    default: Any
    help: str
    group: str
    """What the class that it belongs to is about."""
    resume: Literal["fixed", "grows", "free"]
    """How it may change when a run is resumed."""
    per_process: bool
    """Whether it may differ between the processes of a run."""


@lru_cache(maxsize=1)
def flat_fields() -> dict[str, FlatField]:
    """Give every field of the configuration and of its parts, by name."""
    fields: dict[str, FlatField] = {}
    for kind in (TrainConfig, *_parts(TrainConfig).values()):
        own = fields_of(kind)
        assert not own.keys() & fields.keys(), f"two settings have one name: {own.keys() & fields.keys()}"
        fields |= own
    return fields


def fields_of(kind: type) -> dict[str, FlatField]:
    """Give the fields of one class of settings, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    sentences = _sentences(kind)
    return {
        f.name: FlatField(
            name=f.name,
            type=hints[f.name],
            default=f.default,
            help=sentences[f.name],
            group=(kind.__doc__ or "").strip().splitlines()[0].rstrip("."),
            resume=f.metadata.get("resume", "fixed"),
            per_process=f.metadata.get("per_process", False),
        )
        for f in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(hints[f.name])
    }


def _parts(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}


@lru_cache(maxsize=32)
def _sentences(cls: type) -> dict[str, str]:
    """Read the docstrings that stand under the fields of a class; Python keeps them in the source alone."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    sentences = {}
    for node, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant)
            sentences[node.target.id] = str(below.value.value)
    return sentences
