"""What this process runs on: device, precision, memory, versions."""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import resnext_hub
from resnext_hub.errors import RequestError, setting

THREADS = 1024
"""Most computing threads of a process: more than a machine has cores, and each takes memory."""


def device_type() -> str:
    """Return the type of the device that training uses: cpu, cuda, mps, …"""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def resolve_precision(asked: str, device: str) -> str:
    """Return the precision for `auto`; an explicit one is checked against the device."""
    if asked == "fp16" and device != "cuda":
        raise RequestError(
            f"{setting('mixed_precision', 'fp16')} needs a CUDA GPU, but the device is {device}; use "
            f"{setting('mixed_precision', 'bf16')} or {setting('mixed_precision', 'no')}"
        )
    if asked != "auto":
        return asked
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher in ("bf16", "fp16"):  # a launcher's `no` may be its default
        return resolve_precision(launcher, device)
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "no"
    if device == "cpu":
        return "bf16" if _cpu_computes_bf16() else "no"
    return "no"


def _cpu_computes_bf16() -> bool:
    """Return whether the CPU computes faster in bfloat16 than in float32.

    It does with AMX, and with AVX512-BF16 on AMD. Intel's AVX512-BF16 is slower than its float32: on a Sapphire Rapids
    without AMX, a product of two 1024 x 1024 matrices takes twice as long.
    """
    amx, avx = (
        hasattr(torch.cpu, name) and getattr(torch.cpu, name)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return amx or (avx and not _is_intel())


def _is_intel() -> bool:
    """Return whether the CPU is Intel's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "Intel" in platform.processor()


def keep_memory(device: str) -> None:
    """Make glibc keep the memory that a CPU process frees, for its next allocations.

    By default it returns the pages of each large tensor to the kernel and fetches them again, zeroed, in the next step,
    which takes a tenth of the training time. Peak memory stays the same. Other C libraries are left alone.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
"""Parameters of mallopt (malloc.h): number of separately mapped blocks, and free memory to keep; -1 keeps all."""


@contextlib.contextmanager
def quiet_compilers() -> Iterator[None]:
    """Silence what compilers and converters log about their internals and about a missing CUDA."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation, on the CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)


_ALLOCATION_FAILED = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "Cannot allocate memory",
    "could not create a memory object",  # oneDNN
    "Storage size calculation overflowed",
    "[enforce fail at alloc_cpu.cpp",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of failed allocations in torch and its libraries, most of which have no error class for them."""


def disable_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting their use, which they start to do on import.

    Both work without the package that sends the reports; this makes it look missing. A program that has imported it
    before has made its own choice, which stays.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # how Python marks a module as missing


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Return the folder for files that can be made again: RESNEXT_HUB_CACHE, or `resnext_hub` in the user's cache."""
    root = os.environ.get("RESNEXT_HUB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "resnext_hub")
    return Path(os.path.expanduser(root))


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute a run."""
    packages = ("torch", "timm", "accelerate", "datasets", "numpy", "pillow", "safetensors")
    found = {name: metadata.version(name) for name in packages}
    with contextlib.suppress(metadata.PackageNotFoundError):  # it is optional: Pillow decodes then
        found["simplejpeg"] = metadata.version("simplejpeg")
    return {"resnext-hub": resnext_hub.__version__, "python": platform.python_version(), **found}


def source_digest() -> str:
    """Return a SHA-256 of this package's own Python files, in hexadecimal."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def processor_name(device: torch.device) -> str:
    """Return the product name of the processor or accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the git commit of the checkout that this package runs from, if it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
