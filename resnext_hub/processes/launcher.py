"""What the launcher of a run states in the environment: how many processes there are, and which one this is."""

import os
from dataclasses import dataclass
from datetime import timedelta

from resnext_hub.errors import RequestError
from resnext_hub.text import printable

WAIT = timedelta(hours=6)
"""How long a process waits for another one, which may be evaluating, or writing to a slow disk."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that the launcher started."""

    rank: int
    processes: int
    address: str
    """Host of the store through which the processes find each other."""
    port: int

    @classmethod
    def read(cls) -> "Place":
        """Read what the launcher says in the environment.

        Raises:
            RequestError: If it contradicts itself, or is incomplete, so that the processes would not find each other.
        """
        count, rank = _whole_number("WORLD_SIZE", 1), _whole_number("RANK", 0)
        _whole_number("LOCAL_RANK", 0)
        _whole_number("LOCAL_WORLD_SIZE", 1)
        address = os.environ.get("MASTER_ADDR", "")
        if "WORLD_SIZE" not in os.environ and address:
            raise RequestError(
                f"MASTER_ADDR is {printable(address)} but WORLD_SIZE is not set, so each process would train alone; "
                "start several with torchrun (--nnodes, --nproc_per_node), or unset MASTER_ADDR"
            )
        if count < 1 or rank >= count:
            raise RequestError(f"RANK {rank} of WORLD_SIZE {count}: expected a rank below the number of processes")
        port = _whole_number("MASTER_PORT", 0) if count > 1 else 0
        if count > 1 and not (address and 0 < port < 1 << 16):
            raise RequestError(
                f"WORLD_SIZE is {count} with MASTER_ADDR {printable(address) or 'not set'} and MASTER_PORT {port}; "
                "expected the main process's host and a port (1 to 65535) that is free there; torchrun sets both"
            )
        return cls(rank, count, address, port)


def _whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError(f"{variable} is {printable(text)}; expected a whole number, as torchrun sets it")
    return int(text)


def processes() -> int:
    """Return the number of processes that the launcher started."""
    return max(_whole_number("WORLD_SIZE", 1), 1)


def local_processes() -> int:
    """Return the number of those that run on this machine."""
    return max(_whole_number("LOCAL_WORLD_SIZE", processes()), 1)


def speaks_for_host() -> bool:
    """Return whether this process is the one of its host that reports errors."""
    return _is_first("LOCAL_RANK")


def speaks_for_run() -> bool:
    """Return whether this process is the one of its run that logs and prints results.

    A rank without a number of processes, or one that is no number, was not set by a launcher: such a process is alone.
    """
    return os.environ.get("WORLD_SIZE", "") in ("", "1") or _is_first("RANK")


def _is_first(variable: str) -> bool:
    text = os.environ.get(variable, "")
    return not text.isdigit() or not text.strip("0")


def check_launcher() -> None:
    """Refuse what a launcher can ask for and this training does not do."""
    for variable, what in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
        ("TPU_NAME", "a TPU"),
    ):
        if os.environ.get(variable, "false").lower() not in ("false", "0", ""):
            raise RequestError(f"{what} is asked for; expected plain data parallelism, as a ResNeXt fits one device")
    for variable, harmless, way_out in (
        # by which Accelerate would divide every gradient
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "unset it; --micro-batch-size makes a batch in parts"),
        ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "unset it, or launch without --dynamo_backend; --compile compiles"),
        ("ACCELERATE_TORCH_DEVICE", ("",), "unset it; CUDA_VISIBLE_DEVICES chooses GPUs, ACCELERATE_USE_CPU the CPU"),
        ("ACCELERATE_MIXED_PRECISION", ("", "no", "bf16", "fp16"), "expected no, bf16 or fp16"),
    ):
        value = os.environ.get(variable, "")
        if value.lower() not in harmless:
            raise RequestError(f"{variable} is {printable(value)[:80]}: {way_out}")
