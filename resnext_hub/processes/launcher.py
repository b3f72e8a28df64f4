"""The environment variables of the launcher: the number of processes and the rank of this one."""

import os
from dataclasses import dataclass
from datetime import timedelta

from resnext_hub.errors import RequestError, setting
from resnext_hub.text import printable

WAIT = timedelta(hours=6)
"""How long a process waits for another one, which may be evaluating or writing to a slow disk."""


@dataclass(frozen=True)
class Place:
    """Rank of this process, number of processes, and where they find each other."""

    rank: int
    processes: int
    address: str
    """Host of the store through which the processes find each other."""
    port: int

    @classmethod
    def read(cls) -> "Place":
        """Read the variables that the launcher set.

        Raises:
            RequestError: If they are inconsistent or incomplete, so the processes would not find each other.
        """
        count, rank = _whole_number("WORLD_SIZE", 1), _whole_number("RANK", 0)
        _whole_number("LOCAL_RANK", 0)
        _whole_number("LOCAL_WORLD_SIZE", 1)
        address = os.environ.get("MASTER_ADDR", "")
        if "WORLD_SIZE" not in os.environ and address:
            raise RequestError(
                f"MASTER_ADDR is {printable(address)} but WORLD_SIZE is not set, so each process would train alone; "
                "start several processes with torchrun (--nnodes, --nproc_per_node), or unset MASTER_ADDR"
            )
        if count < 1 or rank >= count:
            raise RequestError(f"RANK is {rank} with WORLD_SIZE {count}; expected a rank below the number of processes")
        port = _whole_number("MASTER_PORT", 0) if count > 1 else 0
        if count > 1 and not (address and 0 < port < 1 << 16):
            raise RequestError(
                f"WORLD_SIZE is {count} with MASTER_ADDR {printable(address) or 'not set'} and MASTER_PORT {port}; "
                "expected the main process's host and a free port on it (1 to 65535); torchrun sets both"
            )
        return cls(rank, count, address, port)


def _whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError(f"{variable} is {printable(text)}; expected a whole number, as set by torchrun")
    return int(text)


def processes() -> int:
    """Return the number of processes that the launcher started."""
    return max(_whole_number("WORLD_SIZE", 1), 1)


def local_processes() -> int:
    """Return the number of processes that the launcher started on this machine."""
    return max(_whole_number("LOCAL_WORLD_SIZE", processes()), 1)


def local_rank() -> int:
    """Return the index of this process among those that the launcher started on this machine."""
    return _whole_number("LOCAL_RANK", 0) if processes() > 1 else 0


def speaks_for_host() -> bool:
    """Return whether this process reports errors for its host."""
    return _is_first("LOCAL_RANK")


def speaks_for_run() -> bool:
    """Return whether this process logs and prints results for the run.

    A rank without WORLD_SIZE, or one that is not a number, was not set by a launcher; such a process runs alone.
    """
    return os.environ.get("WORLD_SIZE", "") in ("", "1") or _is_first("RANK")


def _is_first(variable: str) -> bool:
    text = os.environ.get(variable, "")
    return not text.isdigit() or not text.strip("0")


def check_launcher() -> None:
    """Refuse features of a launcher that this training does not support.

    Raises:
        RequestError: If a variable of Accelerate requests one.
    """
    for variable, feature in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ):
        if os.environ.get(variable, "false").lower() not in ("false", "0", ""):
            raise RequestError(f"{feature} is not supported: a ResNeXt fits on one device; use plain data parallelism")
    if os.environ.get("TPU_NAME"):
        raise RequestError("TPUs are not supported; train on CPUs or GPUs")
    for variable, allowed, remedy in (
        # Accelerate would divide every gradient by it
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), f"unset it and use {setting('micro_batch_size')}"),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            ("", "no"),
            f"unset it, or launch without --dynamo_backend, and use {setting('compile', True)}",
        ),
        (
            "ACCELERATE_TORCH_DEVICE",
            ("",),
            "unset it; choose GPUs with CUDA_VISIBLE_DEVICES, or the CPU with ACCELERATE_USE_CPU",
        ),
        ("ACCELERATE_MIXED_PRECISION", ("", "no", "bf16", "fp16"), "expected no, bf16 or fp16"),
    ):
        value = os.environ.get(variable, "")
        if value.lower() not in allowed:
            raise RequestError(f"{variable} is {printable(value)[:80]}; {remedy}")
