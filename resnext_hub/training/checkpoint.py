"""Checkpoints that are complete or absent.

A checkpoint is a folder such as `step-00000500` with safetensors files and one `state.json`, which holds everything
that is not a tensor, the SHA-256 of each tensor file, and the SHA-256 of its own content.
"""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.files import convert, new_folder, read_json, remove_folder, sha256_of, write_json
from resnext_hub.settings import FREE, FREE_PER_PROCESS, Range, check_fields, shown
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    checkpoint_every: str = field(default="10m", metadata=FREE)
    """Interval between checkpoints, in optimizer steps (500) or minutes (10m); a checkpoint is always saved after the
    last step."""
    keep_checkpoints: Annotated[int, Range(1, 1_000_000)] = field(default=2, metadata=FREE_PER_PROCESS)
    """Number of checkpoints to keep, 1 or more; older ones are deleted."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"[1-9][0-9]{0,8}m?", self.checkpoint_every):
            raise RequestError(
                f"{setting('checkpoint_every', shown(self.checkpoint_every))}: expected steps, such as 500, or "
                "minutes, such as 10m"
            )

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints, or None if the interval is in minutes."""
        return None if self.checkpoint_every.endswith("m") else int(self.checkpoint_every)

    @property
    def seconds(self) -> float | None:
        """Seconds between checkpoints, or None if the interval is in steps."""
        return 60.0 * int(self.checkpoint_every[:-1]) if self.checkpoint_every.endswith("m") else None


@dataclass(frozen=True, kw_only=True)
class BestFacts:
    """The best weights so far."""

    step: int
    correct: int
    loss: float
    epoch: float | None = None
    """None in checkpoints of versions that did not record it."""
    score: float | None = None
    """The number that chose the weights; None in checkpoints of versions that chose by accuracy only."""


@dataclass(frozen=True, kw_only=True)
class StateFacts:
    """The part of a run's state that is not tensors."""

    optimizer: dict[str, dict[str, dict[str, Any]]]
    scaler: dict[str, Any] | None
    best: BestFacts | None
    how: dict[str, Any]
    """What the exact weights depend on besides the settings: processes, threads, precision, …"""
    wall_seconds: float
    resumes: int
    skipped_steps: int
    evaluated: bool
    fingerprint: str
    """Fingerprint of the dataset."""
    decoders: list[str] = field(default_factory=lambda: ["pil"])
    merged_groups: dict[str, int] | None = field(default_factory=dict)
    position: tuple[int, int] | None = None
    """Position in a stream, in checkpoints of versions before 0.3; now it follows from the step."""
    stale: int = 0
    """Evaluations in a row without an improvement."""
    reached: float | None = None
    """The score from which an improvement counts."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that determine the result; empty in checkpoints of versions that did not record them."""

    def __post_init__(self) -> None:
        if not self.decoders:
            raise ValueError("expected at least one decoder")


@dataclass(frozen=True)
class _Contents:
    """Content of state.json: the step, the SHA-256 of each tensor file, and the facts."""

    step: int
    sha256: dict[str, str]
    facts: StateFacts


@dataclass(frozen=True)
class _Sealed:
    """Layout of state.json: its content and the SHA-256 of that content."""

    format_version: Literal[2]
    digest: str
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    facts: StateFacts

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Load the tensors that were saved under a name.

        Raises:
            RequestError: If their file cannot be read.
        """
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise self.mismatch(f"its {name}.safetensors cannot be read: {one_line(error)}") from error

    def mismatch(self, reason: str) -> RequestError:
        """Return an error that explains why the run cannot resume from this checkpoint."""
        return RequestError(
            f"{printable(self.path)} is not a checkpoint of this run ({reason}); remove it, or choose another "
            f"{setting('output_dir')}"
        )

    def matching(self, name: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Load the tensors that were saved under a name, and check them against those of a model.

        Raises:
            RequestError: If their names, shapes or dtypes differ.
        """
        tensors = self.tensors(name)
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has an unexpected tensor {printable(unknown[0])[:80]}"
            raise self.mismatch(f"its {name}.safetensors {what}")
        for key, tensor in tensors.items():
            wanted = expected[key]
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise self.mismatch(f"{key} of its {name}.safetensors is {_shape(tensor)}, expected {_shape(wanted)}")
        return tensors

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings of the run that wrote the checkpoint with the current ones.

        Raises:
            RequestError: If any differs.
        """
        now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        before = self.facts.settings
        differing = [
            f"{setting(name)} was {printable(before[name])} and is now {now[name]}"
            for name in now.keys() & before.keys()
            if now[name] != before[name]
        ]
        if differing:
            raise self.mismatch("; ".join(sorted(differing)))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    facts: StateFacts,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Args:
        folder: Folder of the checkpoints.
        step: Optimizer steps taken.
        tensors: Groups of tensors by name; each is written to a file of its own.
        facts: The rest of the state.
        keep: Number of checkpoints to keep.
    """
    path = folder / f"step-{step:08d}"
    with new_folder(path) as aside:
        digests: dict[str, str] = {}
        for name, group in tensors.items():
            file = aside / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}, file)
            digests[file.name] = sha256_of(file)
        state = {"step": step, "sha256": digests, "facts": dataclasses.asdict(facts)}
        write_json(aside / STATE, {"format_version": 2, "digest": _digest(state), "state": state})
    for old in _steps(folder)[:-keep]:
        remove_folder(folder / f"step-{old:08d}")
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint; log a warning for each damaged one that is skipped."""
    if not folder.is_dir():
        return None
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            return read_checkpoint(path)
        except RequestError as error:
            _logger.warning("checkpoint %s is damaged and is skipped: %s", path.name, error)
    return None


def latest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a folder, intact or not; 0 if there is none."""
    return max(_steps(folder), default=0) if folder.is_dir() else 0


def last_good_checkpoint(folder: Path) -> str:
    """Return a clause for messages that names the newest intact checkpoint."""
    checkpoint = latest_checkpoint(folder)
    return f"the last good checkpoint is {checkpoint.path.name}" if checkpoint else "there is no checkpoint yet"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its files.

    Raises:
        RequestError: If it is damaged.
    """
    file = path / STATE
    content = read_json(file, dict[str, Any], _REMEDY)
    if content.keys() == {"step", "sha256", "facts"}:  # format of versions without a digest
        state = content
    else:
        sealed = convert(content, _Sealed, file, _REMEDY)
        state = sealed.state
        if _digest(state) != sealed.digest:
            raise RequestError(f"{printable(file)} is damaged (its SHA-256 differs); {_REMEDY}")
    contents = convert(state, _Contents, file, _REMEDY)
    if path.name != f"step-{contents.step:08d}":
        raise RequestError(f"{printable(file)} is damaged (it belongs to step {contents.step}); {_REMEDY}")
    if not {"model.safetensors", "optimizer.safetensors"} <= contents.sha256.keys() <= _TENSOR_FILES:
        raise RequestError(f"{printable(file)} is damaged (it lists the wrong files); {_REMEDY}")
    for name, digest in contents.sha256.items():
        damage = _damage(path / name, digest)
        if damage is not None:
            raise RequestError(f"{printable(path / name)} is damaged ({damage}); {_REMEDY}")
    return Checkpoint(path, contents.step, contents.facts)


_REMEDY = "remove the checkpoint"

_TENSOR_FILES = frozenset(f"{name}.safetensors" for name in ("model", "optimizer", "ema", "best", "start"))


def _digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state, independent of key order and whitespace in its file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in ascending order."""
    matches = (re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def _damage(path: Path, digest: str) -> str | None:
    """Return how a file differs from the one whose SHA-256 was recorded, or None if it is intact."""
    if not path.is_file():
        return "missing or not a regular file"
    try:
        return None if sha256_of(path) == digest else "its SHA-256 differs"
    except OSError as error:
        return one_line(error)


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
