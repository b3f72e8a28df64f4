"""Checkpoints that are complete or absent.

A checkpoint is a folder `step-00000500` of safetensors files and one `state.json`, which holds everything that is not a
tensor, the SHA-256 of every tensor file, and the SHA-256 of what it says itself.
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

from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import convert, new_folder, read_json, remove_folder, remove_leftovers, sha256_of, write_json
from resnext_hub.settings import FREE, FREE_PER_PROCESS, Range, check_fields, shown
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved."""

    checkpoint_every: str = field(default="10m", metadata=FREE)
    """Steps (`500`) or minutes (`10m`) between checkpoints; the last step always makes one."""
    keep_checkpoints: Annotated[int, Range(1, 1_000_000)] = field(default=2, metadata=FREE_PER_PROCESS)
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"[1-9][0-9]{0,8}m?", self.checkpoint_every):
            raise RequestError(
                f"--checkpoint-every {shown(self.checkpoint_every)}: expected steps, as 500, or minutes, as 10m"
            )

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints, or None if minutes were asked for."""
        return None if self.checkpoint_every.endswith("m") else int(self.checkpoint_every)

    @property
    def seconds(self) -> float | None:
        """Seconds between checkpoints, or None if steps were asked for."""
        return 60.0 * int(self.checkpoint_every[:-1]) if self.checkpoint_every.endswith("m") else None


@dataclass(frozen=True, kw_only=True)
class BestFacts:
    """The best weights so far."""

    step: int
    correct: int
    loss: float
    epoch: float | None = None
    """None in a checkpoint that was written before it was noted."""


@dataclass(frozen=True, kw_only=True)
class StateFacts:
    """Everything of a run's state that is not a tensor."""

    optimizer: dict[str, dict[str, dict[str, Any]]]
    scaler: dict[str, Any] | None
    best: BestFacts | None
    how: dict[str, Any]
    """What the bits depend on beside the settings: processes, threads, precision, …"""
    wall_seconds: float
    resumes: int
    skipped_steps: int
    evaluated: bool
    position: tuple[int, int]
    fingerprint: str
    """Of the dataset."""
    decoders: list[str] = field(default_factory=lambda: ["pil"])
    merged_groups: dict[str, int] | None = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that decide the result; empty in a checkpoint that was written before they were noted."""

    def __post_init__(self) -> None:
        if not self.decoders:
            raise ValueError("expected a decoder")


@dataclass(frozen=True)
class _Contents:
    """What state.json says: the step, the SHA-256 of the tensor files, and the facts."""

    step: int
    sha256: dict[str, str]
    facts: StateFacts


@dataclass(frozen=True)
class _Sealed:
    """state.json: its contents with their own SHA-256."""

    format_version: Literal[2]
    digest: str
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    step: int
    facts: StateFacts

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read the tensors that were saved under a name.

        Raises:
            RequestError: If there are none.
        """
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise self.foreign(f"its {name}.safetensors cannot be read: {one_line(error)}") from error

    def foreign(self, reason: str) -> RequestError:
        """Return the error that says why a run cannot go on from here."""
        return RequestError(
            f"{printable(self.path)} is not a checkpoint of this run ({reason}); remove it, or give another "
            "--output-dir"
        )

    def matching(self, name: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Read the tensors that were saved under a name, which have to be those of a model by name, shape and type.

        Raises:
            RequestError: If they are not.
        """
        tensors = self.tensors(name)
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has an unknown {printable(unknown[0])[:80]}"
            raise self.foreign(f"its {name}.safetensors {what}")
        for key, tensor in tensors.items():
            wanted = expected[key]
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise self.foreign(
                    f"{key} of its {name}.safetensors is {_shape(tensor)}, and the model's is {_shape(wanted)}"
                )
        return tensors

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings that the checkpoint was written under with those of now.

        Raises:
            RequestError: If any differs.
        """
        now = json.loads(json.dumps(settings))  # as it was written: lists for tuples
        before = self.facts.settings
        differing = [
            f"{name} {printable(before[name])} there, {now[name]} now"
            for name in now.keys() & before.keys()
            if now[name] != before[name]
        ]
        if differing:
            raise self.foreign("; ".join(sorted(differing)))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    facts: StateFacts,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        folder: The folder of checkpoints.
        step: Optimizer steps done.
        tensors: Named groups of tensors, each a file.
        facts: Everything else.
        keep: How many checkpoints stay.
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
    """Return the newest checkpoint whose files are as they were written; name each damaged one that is ignored."""
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            return read_checkpoint(path)
        except RequestError as error:
            _logger.warning("checkpoint %s is damaged and ignored: %s", path.name, error)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and compare its files with what was written.

    Raises:
        RequestError: If it is damaged.
    """
    file = path / STATE
    content = read_json(file, dict[str, Any], _WAY_OUT)
    if content.keys() == {"step", "sha256", "facts"}:  # as it was written before it had a digest of its own
        state = content
    else:
        sealed = convert(content, _Sealed, file, _WAY_OUT)
        state = sealed.state
        if _digest(state) != sealed.digest:
            raise RequestError(f"{printable(file)} is damaged (other content than was written); {_WAY_OUT}")
    contents = convert(state, _Contents, file, _WAY_OUT)
    if path.name != f"step-{contents.step:08d}":
        raise RequestError(f"{printable(file)} is damaged (it is of step {contents.step}); {_WAY_OUT}")
    if not {"model.safetensors", "optimizer.safetensors"} <= contents.sha256.keys() <= _TENSOR_FILES:
        raise RequestError(f"{printable(file)} is damaged (it lists other files); {_WAY_OUT}")
    for name, digest in contents.sha256.items():
        damage = _damage(path / name, digest)
        if damage is not None:
            raise RequestError(f"{printable(path / name)} is damaged ({damage}); {_WAY_OUT}")
    return Checkpoint(path, contents.step, contents.facts)


_WAY_OUT = "remove the checkpoint"

_TENSOR_FILES = frozenset(f"{name}.safetensors" for name in ("model", "optimizer", "ema", "best"))


def _digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state, whatever the order of its keys and the layout of its file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in the order of their numbers."""
    matches = (re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def _damage(path: Path, digest: str) -> str | None:
    """Say what is wrong with a file that was written with a SHA-256."""
    if not path.is_file():
        return "missing, or not a regular file"
    try:
        return None if sha256_of(path) == digest else "other bytes than were written"
    except OSError as error:
        return one_line(error)


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
