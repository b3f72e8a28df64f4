"""Set up Accelerate and computing threads for the processes that the launcher started."""

from typing import TYPE_CHECKING

import torch

from resnext_hub.errors import RequestError, RunError
from resnext_hub.machine import cores, device_type
from resnext_hub.processes.launcher import WAIT, local_processes, processes

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_accelerator(precision: str, deterministic: bool) -> "Accelerator":
    """Return an accelerator for the processes that the launcher started.

    On CPU, Accelerate must be told so explicitly; several processes would otherwise each train alone.

    Args:
        precision: Mixed precision: `no`, `bf16` or `fp16`.
        deterministic: Whether to sum gradients in the same order before and after a resume.

    Raises:
        RunError: If it does not see as many processes as the launcher started.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if AcceleratorState._shared_state.get("_mixed_precision") not in (None, precision):
        AcceleratorState._reset_state()  # an earlier run of this process, such as in a notebook, had another precision
    accelerator = Accelerator(
        cpu=device_type() == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[
            # keeps the initial gradient buckets: otherwise DDP rebuilds them after the first pass, and a resumed run
            # would sum in another order
            DistributedDataParallelKwargs(find_unused_parameters=deterministic),
            InitProcessGroupKwargs(timeout=WAIT),
        ],
    )
    if accelerator.num_processes != processes():
        raise RunError(
            f"the launcher started {processes()} processes, but Accelerate found {accelerator.num_processes}"
        )
    return accelerator


def check_devices(device: str, available: int | None = None) -> None:
    """Check that each process of this machine has a device of its own.

    Args:
        device: Type of the device.
        available: Number of such devices; by default, those that torch sees.

    Raises:
        RequestError: If processes would share a device: NCCL cannot add up their gradients.
    """
    available = torch.accelerator.device_count() if available is None else available
    started = local_processes()
    if device != "cpu" and started > available:
        devices = f"{available} {device} device{'' if available == 1 else 's'}"
        raise RequestError(
            f"{started} processes were started on this machine, but {devices} {'is' if available == 1 else 'are'} "
            f"visible; start at most {available}, or use the CPU with ACCELERATE_USE_CPU=true"
        )


def set_threads(asked: str, device: str) -> None:
    """Set the computing threads of a CPU process; `auto` shares the cores among the processes of this machine."""
    if device == "cpu":
        torch.set_num_threads(max(cores() // local_processes(), 1) if asked == "auto" else int(asked))
