"""Settings of runs with virtual processes (`--elastic`): what they need, and what they keep the same everywhere."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from resnext_hub.errors import RequestError, setting
from resnext_hub.machine import cores
from resnext_hub.processes.launcher import processes
from resnext_hub.training.config import TrainConfig


def check_elastic(config: TrainConfig) -> None:
    """Raise RequestError if virtual processes cannot be divided among the processes, or other settings prevent them."""
    count = config.elastic
    if count is None:
        return
    chosen = setting("elastic", count)
    if count & (count - 1):
        below = 1 << (count.bit_length() - 1)
        raise RequestError(f"{chosen}: expected a power of two, such as {below} or {2 * below}")
    if count % processes():
        *fewer, most = [str(1 << power) for power in range(count.bit_length())]
        raise RequestError(
            f"{chosen} cannot be divided among {processes()} processes; start {', '.join(fewer)} or {most}"
        )
    for name, value, reason in (
        ("compile", True, "compiled code may add numbers in a different order in each process"),
        ("deterministic", False, "it needs deterministic algorithms"),
    ):
        if getattr(config, name) is value:
            raise RequestError(f"{chosen} cannot be combined with {setting(name, value)}: {reason}; omit one of them")


def resolve_elastic(config: TrainConfig, before: Mapping[str, Any], device: str) -> TrainConfig:
    """Return a configuration whose open fields do not depend on the number of processes, or on timings.

    Args:
        config: The configuration.
        before: Settings of the run that is resumed, if any.
        device: Type of device.

    Raises:
        RequestError: If the run would be resumed with another number of threads.
    """
    if config.elastic is None:
        return config
    threads = config.threads
    if device == "cpu":
        started = before.get("threads") if before.get("elastic") else None
        if threads == "auto":
            threads = started or str(max(cores() // config.elastic, 1))
        elif started not in (None, threads):
            raise RequestError(
                f"{setting('threads', threads)}: the run was started with {started} threads per virtual process, and "
                f"{setting('elastic')} does not allow a different number; use {setting('threads', started)}"
            )
    return dataclasses.replace(
        config,
        threads=threads,
        deterministic=True,
        merge_groups="off" if config.merge_groups == "auto" else config.merge_groups,
    )
