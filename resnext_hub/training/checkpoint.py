"""Checkpoints that are complete or absent, and the lock that keeps a run folder to one run.

A checkpoint is a folder `step-00000500` of safetensors files and one `state.json`, which holds everything that is not a
tensor and the SHA-256 of every tensor file.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from resnext_hub.errors import RequestError
from resnext_hub.files import new_folder, remove_folder, remove_leftovers, sha256_of, write_json

_logger = logging.getLogger(__name__)

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved."""

    checkpoint_every: str = "10m"
    """Steps (`500`) or minutes (`10m`) between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*m?", self.checkpoint_every):
            raise RequestError(
                f"--checkpoint-every {self.checkpoint_every}: expected steps, as 500, or minutes, as 10m"
            )
        if self.keep_checkpoints < 1:
            raise RequestError(f"--keep-checkpoints {self.keep_checkpoints}: expected at least 1")

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints, or None if minutes were asked for."""
        return None if self.checkpoint_every.endswith("m") else int(self.checkpoint_every)

    @property
    def seconds(self) -> float | None:
        """Seconds between checkpoints, or None if steps were asked for."""
        return 60.0 * int(self.checkpoint_every[:-1]) if self.checkpoint_every.endswith("m") else None


class RunLock:
    """An exclusive lock on a run folder, released by the kernel when the process ends, however it ends.

    It is a record lock: workers forked by this process do not hold it.

    Raises:
        RequestError: If another process holds it, whose pid is named.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        self._file = open(path, "a+")  # noqa: SIM115 - closing the file would release the lock
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RequestError(
                f"{folder} is in use by a running process, pid {holder}; wait for it, or give another --output-dir"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    step: int
    facts: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read the tensors that were saved under a name."""
        return load_file(self.path / f"{name}.safetensors")


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        folder: The folder of checkpoints.
        step: Optimizer steps done.
        tensors: Named groups of tensors, each a file.
        facts: Everything else, as JSON.
        keep: How many checkpoints stay.
    """
    path = folder / f"step-{step:08d}"
    with new_folder(path) as aside:
        digests = {}
        for name, group in tensors.items():
            file = aside / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}, file)
            digests[file.name] = sha256_of(file)
        write_json(aside / STATE, {"step": step, "sha256": digests, "facts": dict(facts)})
    for old in _steps(folder)[:-keep]:
        remove_folder(folder / f"step-{old:08d}")
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Give the newest checkpoint whose files are as they were written; name each damaged one that is passed over."""
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        damage = _damage(path)
        if damage is None:
            state = json.loads((path / STATE).read_text())
            return Checkpoint(path, step, state["facts"])
        _logger.warning("checkpoint %s is damaged (%s) and is passed over", path.name, damage)
    return None


def _steps(folder: Path) -> list[int]:
    """Give the steps of the checkpoints in a folder, in the order of their numbers."""
    matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def _damage(path: Path) -> str | None:
    try:
        digests = json.loads((path / STATE).read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE}: {error}"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != digest:
            return f"{name} has other bytes than were written"
    return None
