"""Accelerate and computing threads, set up for the processes that the launcher started."""

from typing import TYPE_CHECKING

import torch

from resnext_hub.errors import RunError
from resnext_hub.machine import cores, device_type
from resnext_hub.processes.launcher import WAIT, local_processes, processes

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_accelerator(precision: str, deterministic: bool) -> "Accelerator":
    """Start Accelerate for the processes that the launcher made.

    Without an accelerator device it must be told so: it would leave several CPU processes each alone otherwise.

    Args:
        precision: Mixed precision, resolved.
        deterministic: Whether gradients are to be added up in the same order after a resume as before it.

    Raises:
        RunError: If it does not see as many processes as the launcher started.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=device_type() == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[
            # keeps the gradients' buckets as they are at the start: they are rearranged after the first pass otherwise,
            # so that a resumed run adds in another order than the one before
            DistributedDataParallelKwargs(find_unused_parameters=deterministic),
            InitProcessGroupKwargs(timeout=WAIT),
        ],
    )
    if accelerator.num_processes != processes():
        raise RunError(f"the launcher started {processes()} processes, but Accelerate sees {accelerator.num_processes}")
    return accelerator


def set_threads(asked: str, device: str) -> None:
    """Set the computing threads of a CPU process; `auto` shares the cores among the processes of this machine."""
    if device == "cpu":
        torch.set_num_threads(max(cores() // local_processes(), 1) if asked == "auto" else int(asked))
