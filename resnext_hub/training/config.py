"""The configuration of a run, composed of the configurations that live beside the code that uses them.

Flags and files are flat: a field name is unique across all configurations. Fields that are None are derived in
`runs/request.py`; a resolved configuration written to a file reproduces the run.
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
from resnext_hub.errors import RequestError, setting
from resnext_hub.machine import THREADS
from resnext_hub.models.views import TestTimeAugmentation
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
from resnext_hub.trackers.names import tracker_names
from resnext_hub.training.balance import BalanceConfig
from resnext_hub.training.checkpoint import CheckpointConfig
from resnext_hub.training.finetune import FinetuneConfig
from resnext_hub.training.optim import OptimConfig

STEPS = 1_000_000_000
BATCH = 1 << 20
WIDTHS = 1 << 16
"""Upper bounds of steps, samples in a batch, and channels of a convolution group."""

ALIASES = {
    "learning_rate": "lr",
    "initial_lr": "lr",
    "lr0": "lr",
    "wd": "weight_decay",
    "class_weight": "class_weights",
    "metric_for_best_model": "best_by",
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
    "valid_split": "eval_split",
    "val_fraction": "eval_fraction",
    "torchcompile": "compile",
    "warmup": "warmup_epochs",
    "random_seed": "seed",
    "hub_model_id": "repo_id",
    "save_every": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "logging_steps": "log_every",
    "report_to": "track",
    "log_with": "track",
    "trackers": "track",
}
"""Names that other trainers use for a setting, and its name here."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Publishing to the Hub."""

    push_to_hub: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Publish the model folder when the run has finished."""
    push_checkpoints: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Upload the latest checkpoint to the `checkpoints` branch of the repository, for --resume-from hub:owner/name."""
    repo_id: str | None = field(default=None, metadata=FREE_PER_PROCESS)
    """Repository on the Hub, owner/name; created if it does not exist."""
    license: str | None = field(default=None, metadata=FREE_PER_PROCESS)
    """License of the weights, such as apache-2.0; required to publish."""
    private: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Create the repository as private if it does not exist."""

    def __post_init__(self) -> None:
        if (self.push_to_hub or self.push_checkpoints) and not self.repo_id:
            needing = setting("push_to_hub" if self.push_to_hub else "push_checkpoints", True)
            raise RequestError(f"{needing} needs {setting('repo_id')}; for example, me/name")
        if self.push_to_hub and not self.license:
            raise RequestError(
                f"{setting('push_to_hub', True)} needs {setting('license')}; for example, apache-2.0, mit or "
                "cc-by-nc-4.0"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training."""

    model: str = "resnext_g32"
    """timm model name, hf-hub:owner/name, or local-dir:FOLDER."""
    pretrained: bool | None = None
    """Start from pretrained weights. By default, on for models given as hf-hub:... or local-dir:... and in the recipes
    auto, finetune and linear-probe, and off otherwise."""
    drop_rate: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Dropout probability before the classifier, at least 0 and below 1."""
    drop_path: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Stochastic depth: probability of dropping the residual branch of the last block, at least 0 and below 1; the
    probability increases linearly with depth up to this value."""
    epochs: Annotated[float, Range(0, 1_000_000)] = field(default=30.0, metadata=GROWS)
    """Number of passes over the training split; fractions are allowed. 0 is allowed with --fit-head."""
    max_steps: Annotated[int, Range(1, STEPS)] | None = field(default=None, metadata=GROWS)
    """Number of optimizer steps; overrides --epochs."""
    batch_size: Annotated[int, Range(1, BATCH)] = 128
    """Global batch size: images per optimizer step, summed over all processes."""
    repeated_augmentation: Annotated[int, Range(1, 64)] = 1
    """Number of times that each image occurs in a batch, each time augmented differently (Hoffer et al., 2020). The
    length of an epoch does not change, so an epoch contains fewer distinct images."""
    micro_batch_size: Annotated[int, Range(1, BATCH)] | None = None
    """Number of images per forward and backward pass of each process, for gradient accumulation; if not given,
    gradients are not accumulated."""
    elastic: Annotated[int, Range(2, BATCH)] | None = None
    """Number of virtual processes, a power of two that divides the batch size. Runs with 1, 2, 4, … up to this number
    of processes then produce bit-identical weights, even when resumed with a different number of processes. Each
    virtual process has its own batch norm statistics and random numbers, as each real process otherwise would. Off if
    not given."""
    eval_batch_size: Annotated[int, Range(1, BATCH)] = 32
    """Number of images per forward pass of each process during evaluation."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation, for evaluation and prediction: flip averages the logits of an image and its mirror image,
    at twice the cost; none uses the image alone."""
    calibrate: bool = field(default=True, metadata=FREE)
    """Calibrate the probabilities of the published model: divide the weights of its classifier by a temperature that is
    fitted on the evaluation split (Guo et al., 2017). This does not change any predicted class. It has no effect if an
    image can have several labels."""
    loss: Literal["cross-entropy", "bce"] | None = None
    """Loss function: cross-entropy, for mutually exclusive classes, or bce, the binary cross-entropy of each class
    against all others (Wightman et al., 2021). If not given, bce if an image can have several labels, and cross-entropy
    otherwise."""
    label_smoothing: Annotated[float, Range(0, 1, below=True)] | None = None
    """Label smoothing: fraction of the target probability that is spread evenly over all classes, at least 0 and below
    1. If not given, 0 if an image can have several labels, and 0.1 otherwise."""
    ema: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    """Decay of an exponential moving average (EMA) of the weights, such as 0.9998; the average is evaluated and
    published. No EMA if not given."""
    seed: Annotated[int, Range(0, SEEDS)] = 0
    """Random seed for weight initialization, sample order and augmentation."""
    deterministic: bool | None = field(default=None, metadata=FREE)
    """Use only deterministic algorithms; if not given, on for CPUs and off for accelerators."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast precision. auto uses the setting of the launcher if there is one; otherwise, it uses bf16 on devices
    where bf16 is fast, and no autocast (no) on all others."""
    merge_groups: str = field(default="auto", metadata=FREE)
    """Compute adjacent groups of a grouped convolution as one wider group, with the same result up to rounding: auto
    merges groups where merging was measured to be faster; off merges none; a number merges the groups of all layers to
    that width in channels, or to the largest possible width below it."""
    compile: bool = field(default=False, metadata=FREE)
    """Compile the model with torch.compile; the first step then takes a minute or more."""
    progressive_size: Annotated[int, Range(1, IMAGE_SIZE)] | None = None
    """Progressive resizing: initial image size, in pixels, which increases to --image-size over the first three
    quarters of the run. Off if not given."""
    threads: str = field(default="auto", metadata=FREE_PER_PROCESS)
    """Number of CPU threads per process; auto divides the cores among the processes."""
    log_every: Annotated[int, Range(1, STEPS)] = field(default=10, metadata=FREE)
    """Number of optimizer steps between training entries in metrics.jsonl, and between updates of the progress
    display."""
    eval_every: Annotated[float, Range(0.001, STEPS)] = 1.0
    """Number of epochs between evaluations; fractions are allowed. The model is always evaluated after the last
    step."""
    log_samples: bool = field(default=False, metadata=FREE_PER_PROCESS)
    """Write a file samples-P.jsonl for each process P, with the image indices and a hash of the pixels of every
    step."""
    track: str | None = field(default=None, metadata=FREE_PER_PROCESS)
    """Comma-separated list of experiment trackers that also receive the metrics: tensorboard, trackio, wandb, mlflow.
    Each tracker requires the extra of the same name."""
    data: DataConfig = field(default_factory=DataConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        tracker_names(self.track)
        if self.merge_groups not in ("auto", "off") and not is_count(self.merge_groups, WIDTHS):
            raise RequestError(
                f"{setting('merge_groups', shown(self.merge_groups))}: expected auto, off or a width in channels "
                f"from 1 to {WIDTHS:,}, such as 32"
            )
        if not self.epochs and self.max_steps is None and not self.finetune.fit_head:
            raise RequestError(
                f"{setting('epochs', 0)} trains nothing; use more epochs, or {setting('fit_head', True)} to train only "
                "the classifier"
            )
        if self.finetune.fit_head and self.data.streaming:
            raise RequestError(
                f"{setting('fit_head', True)} reads the training images before the first step, which "
                f"{setting('streaming', True)} does not allow; omit one of them"
            )
        if self.repeated_augmentation > 1 and (self.data.streaming or self.balance.sampling == "balanced"):
            other = setting("streaming", True) if self.data.streaming else setting("sampling", "balanced")
            raise RequestError(
                f"{setting('repeated_augmentation', self.repeated_augmentation)} cannot be combined with {other}; omit "
                "one of them"
            )
        if self.balance.best_by == "last" and self.finetune.early_stopping is not None:
            raise RequestError(
                f"{setting('early_stopping', self.finetune.early_stopping)} needs a metric, but "
                f"{setting('best_by', 'last')} uses none; choose another {setting('best_by')}"
            )
        if self.repeated_augmentation > self.batch_size:
            raise RequestError(
                f"{setting('repeated_augmentation', self.repeated_augmentation)} needs {setting('batch_size')} to be "
                f"at least {self.repeated_augmentation}"
            )
        if self.threads != "auto" and not is_count(self.threads, THREADS):
            raise RequestError(
                f"{setting('threads', shown(self.threads))}: expected auto or a number of threads from 1 to {THREADS:,}"
            )

    def images_per_pass(self, processes: int) -> int:
        """Return the images of a forward pass, given the number of processes; the last micro-batch may be smaller."""
        part = self.batch_size // (self.elastic or processes)
        return min(self.micro_batch_size or part, part)

    def to_flat(self) -> dict[str, Any]:
        """Return the value of every field by its flat name; the inverse of `from_flat`."""
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
        """Build a configuration from values by flat name; other fields keep their defaults.

        Raises:
            RequestError: If a name is unknown, or a value has the wrong type or is out of range.
        """
        known = flat_fields()
        for name in values:
            if name not in known:
                hint = (
                    did_you_mean(name.replace("-", "_"), known, ALIASES)
                    or "; `resnext-hub train --help` lists the settings"
                )
                raise RequestError(f"unknown setting {shown(name)}{hint}")
        checked = {name: check_value(name, value, known[name].type) for name, value in values.items()}
        own = {f.name: checked[f.name] for f in dataclasses.fields(cls) if f.name in checked}
        for part, kind in _parts(cls).items():
            mine = {f.name: checked[f.name] for f in dataclasses.fields(kind) if f.name in checked}
            own[part] = kind(**mine)
        return cls(**own)


def resumable_fields() -> frozenset[str]:
    """Return the settings that may change when a run is resumed.

    Another decoder produces slightly different pixels, so `runs/request.py` allows it only if requested explicitly.
    """
    return frozenset(name for name, field in flat_fields().items() if field.resume == "free")


def growing_fields() -> frozenset[str]:
    """Return the settings that may only be increased when a run is resumed."""
    return frozenset(name for name, field in flat_fields().items() if field.resume == "grows")


def process_fields() -> frozenset[str]:
    """Return the settings that may differ between the processes of a run."""
    return frozenset(name for name, field in flat_fields().items() if field.per_process)


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the result, without local paths; the dataset has a fingerprint."""
    settings = config.to_flat()
    excluded = resumable_fields() | growing_fields() | {"dataset"}
    if settings["model"].startswith("local-dir:"):
        excluded = excluded | {"model"}
    return {name: value for name, value in settings.items() if name not in excluded}


@dataclass(frozen=True, kw_only=True)
class FlatField:
    """A field of the configuration, by its flat name."""

    name: str
    type: Any
    default: Any
    help: str
    """The docstring under the field."""
    group: str
    """Title of the class that it belongs to."""
    resume: Literal["fixed", "grows", "free"]
    """How it may change when a run is resumed."""
    per_process: bool
    """Whether it may differ between the processes of a run."""


@lru_cache(maxsize=1)
def flat_fields() -> dict[str, FlatField]:
    """Return every field of the configuration and its parts, by name."""
    fields: dict[str, FlatField] = {}
    for kind in (TrainConfig, *_parts(TrainConfig).values()):
        own = fields_of(kind)
        assert not own.keys() & fields.keys(), f"duplicate settings: {own.keys() & fields.keys()}"
        fields |= own
    return fields


def fields_of(kind: type) -> dict[str, FlatField]:
    """Return the fields of one configuration class, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    docs = _field_docstrings(kind)
    return {
        f.name: FlatField(
            name=f.name,
            type=hints[f.name],
            default=f.default,
            help=docs[f.name],
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
def _field_docstrings(cls: type) -> dict[str, str]:
    """Read the docstrings under the fields of a class from its source; Python does not keep them at run time."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant)
            docs[node.target.id] = str(below.value.value)
    return docs
