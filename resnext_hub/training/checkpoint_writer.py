"""Write checkpoints in a thread, so that training continues meanwhile.

A step only copies the state to host memory. The thread has no tensor to compute: it serializes, hashes, flushes to disk
and renames, which all leave the interpreter to the training loop.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from resnext_hub.errors import RunError, one_line
from resnext_hub.training.checkpoint import StateFacts, last_good_checkpoint, save_checkpoint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at a step, in host memory, which later steps do not change."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """Groups of contiguous tensors by name."""
    facts: StateFacts

    @classmethod
    def take(
        cls,
        step: int,
        changing: Mapping[str, Mapping[str, torch.Tensor]],
        constant: Mapping[str, Mapping[str, torch.Tensor]],
        facts: StateFacts,
    ) -> "Snapshot":
        """Copy a state.

        Args:
            step: Optimizer steps taken.
            changing: Groups of tensors that later steps change in place.
            constant: Groups of tensors in host memory that are replaced but never changed; they are not copied.
            facts: The rest of the state.
        """
        tensors = {name: host_copy(group) for name, group in changing.items()}
        tensors |= {name: {key: t.contiguous() for key, t in group.items()} for name, group in constant.items()}
        return cls(step, tensors, copy.deepcopy(facts))


@torch.no_grad()
def host_copy(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous copies of tensors in host memory."""
    copies = {}
    devices = set()
    for name, tensor in tensors.items():
        cuda = tensor.device.type == "cuda"
        mine = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        copies[name] = mine.copy_(tensor, non_blocking=cuda)  # all transfers are queued before the first is awaited
        if cuda:
            devices.add(tensor.device)
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


class CheckpointWriter:
    """A context that writes checkpoints in a thread, at most one at a time; at its end, the last one is complete.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of checkpoints to keep.
        written: Called in the thread with the path of each new checkpoint.
        failed: Called in the thread if one could not be written; the next call of `write` or `wait` raises the error.
    """

    def __init__(self, folder: Path, keep: int, written: Callable[[Path], None], failed: Callable[[], None]) -> None:
        self._folder, self._keep, self._written, self._failed = folder, keep, written, failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(self, take: Callable[[], Snapshot]) -> None:
        """Wait until the previous checkpoint is complete, take a snapshot, and return while it is written.

        Raises:
            RunError: If the previous checkpoint could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, take())

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            RunError: If it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
        elif self._pending is not None and (error := self._pending.exception()) is not None:
            _logger.warning("%s", one_line(error))

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._written(self._save(snapshot))
        except BaseException:
            self._failed()
            raise

    def _save(self, snapshot: Snapshot) -> Path:
        try:
            return save_checkpoint(self._folder, snapshot.step, snapshot.tensors, snapshot.facts, self._keep)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the checkpoint of step {snapshot.step} could not be written ({one_line(error)}); "
                f"{last_good_checkpoint(self._folder)}",
                everywhere=True,
            ) from error
