"""What the processes of a run agree on, and how the failure of one reaches all of them.

Each process reads a command line, a disk and packages of its own, which may differ on another host. Before the first
step they compare what decides the run, and wherever one of them fails the others hear of it and stop as well.
"""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from resnext_hub.errors import RequestError, RunError, failed_system_call, one_line
from resnext_hub.machine import device_type
from resnext_hub.processes.launcher import WAIT, Place
from resnext_hub.text import printable

RENDEZVOUS = timedelta(minutes=5)
"""How long a process waits for the others to start."""

PARTING = timedelta(seconds=5)
"""How long the main process, which holds the store, stays for others to read why the run cannot start."""

SHOWN = 4
"""How many differing settings a message names."""

T = TypeVar("T")


class Peers:
    """The processes of one run; with one process, everything here is a plain function call.

    All processes make the same calls in the same order. One that fails before its next call tells the others in place
    of that call, whichever it is, and they fail there as well.

    Args:
        rank: Index of this process; 0 is the main one.
        size: How many there are.
        group: A gloo group of all of them, for CPU tensors.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group = group
        self._failed = False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Return what the work gives here, after it has succeeded in every process.

        Raises:
            RequestError: In every process, if that or another error below was raised in any.
            RunError: The same.
        """
        if self.size == 1:
            return work()
        failure: RequestError | RunError | None = None
        try:
            result = work()
        except (RequestError, RunError) as error:
            failure = error
        except OSError as error:
            failure = failed_system_call(error)
        if failure is not None and self._failed:
            raise failure  # which is what the others failed of, or they know of it
        reports = self._gather(None if failure is None else _Failure.of(failure))
        self._require_success(reports, failure)
        return result

    def from_main(self, work: Callable[[], T]) -> T:
        """Return in every process what the work gives in the main process, which alone does it."""
        done = self.together(lambda: [work()] if self.is_main else [])
        if self.size == 1:
            return done[0]
        box: list[Any] = done or [None]
        with lost_peers(self.rank, self.size):
            distributed.broadcast_object_list(box, src=0, group=self._group)
        found: T = box[0]
        return found

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return [value] if self.size == 1 else self._gather(value)

    def agree(self, work: Callable[[], T], facts: Callable[[T], Mapping[str, object]]) -> T:
        """Return what the work gives here, after all processes were found to have the same facts of theirs.

        Raises:
            RequestError: In every process, if the facts differ; the host, the fact and both values are named.
        """
        if self.size == 1:
            return work()
        result = self.together(work)
        found = self._gather((platform.node(), dict(facts(result))))
        difference = _difference(found)
        if difference is not None:
            self._failed = True
            self._part()
            raise RequestError(difference)
        return result

    def share_tensors(self, load: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return in every process, on the CPU, the tensors that the main process loads; they are sent one by one."""
        loaded: dict[str, torch.Tensor] = {}

        def describe() -> list[tuple[str, torch.Size, torch.dtype]]:
            loaded.update(load())
            return [(name, tensor.shape, tensor.dtype) for name, tensor in loaded.items()]

        layout = self.from_main(describe)
        if self.size == 1:
            return loaded
        shared = {}
        with lost_peers(self.rank, self.size):
            for name, shape, dtype in layout:
                mine = loaded[name].detach().cpu().contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
                if mine.numel():
                    distributed.broadcast(mine.view(-1).view(torch.uint8), src=0, group=self._group)
                shared[name] = mine
        return shared

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        try:
            with lost_peers(self.rank, self.size):
                distributed.all_gather_object(found, value, group=self._group)
        except RunError:
            self._failed = True
            raise
        return found

    def _require_success(self, reports: list["_Failure | None"], mine: RequestError | RunError | None) -> None:
        failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
        if not failed:
            return
        self._failed = True
        self._part()
        rank, first = failed[0]
        text = mine.message if mine is not None else f"host {printable(first.host)} (rank {rank}): {first.text}"
        if first.wrong_request:
            raise RequestError(text) from mine
        raise RunError(text, everywhere=True) from mine

    def _part(self) -> None:
        """Wait until all have heard, as the connection of one that ends first would break under the others."""
        with contextlib.suppress(RuntimeError):
            distributed.barrier(group=self._group)


@dataclass(frozen=True)
class _Failure:
    """What failed in a process."""

    host: str
    text: str
    wrong_request: bool

    @classmethod
    def of(cls, error: RequestError | RunError) -> "_Failure":
        """Describe an error of this process."""
        return cls(platform.node(), error.message, isinstance(error, RequestError))


def _difference(found: list[tuple[str, dict[str, object]]]) -> str | None:
    """Describe how the facts of the first process that differs from the main one differ from them, in one line."""
    (_, main), *_ = found
    differing = [
        (rank, host, [name for name in main if facts.get(name) != main[name]])
        for rank, (host, facts) in enumerate(found)
    ]
    differing = [entry for entry in differing if entry[2]]
    if not differing:
        return None
    rank, host, names = differing[0]
    facts = found[rank][1]
    shown = [f"{name} {_shown(facts.get(name))}, rank 0 has {_shown(main[name])}" for name in names[:SHOWN]]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    others = f" (and {len(differing) - 1} more processes differ)" if len(differing) > 1 else ""
    return (
        f"host {printable(host)} (rank {rank}): {'; '.join(shown + more)}{others}; start every process with the same "
        "settings, dataset and package versions"
    )


def _shown(value: object) -> str:
    text = printable("none" if value is None else str(value))
    return text if len(text) <= 100 else f"{text[:97]}…"


@contextlib.contextmanager
def lost_peers(rank: int, size: int) -> Iterator[None]:
    """Report in one line that another process has ended, which shows as a broken connection to it."""
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if size == 1 or not lost:
            raise
        raise RunError(
            f"process {rank} has lost another process of the run ({one_line(error)[:120]}); see that process's output; "
            "rerun the same command to resume from the last checkpoint"
        ) from error


def join() -> Peers:
    """Open the process group of the processes that the launcher started.

    Raises:
        RequestError: If the launcher's variables are wrong, or processes were started as parts of different runs.
        RunError: If the others do not start in time.
    """
    place = Place.read()
    if place.processes == 1:
        return Peers()
    store = open_store(place, serves=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    _check_in(store, place)
    device = device_type()
    backend = "gloo" if device == "cpu" else distributed.get_default_backend_for_device(device)
    with lost_peers(place.rank, place.processes):
        distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.processes, timeout=WAIT)
        return Peers(place.rank, place.processes, distributed.new_group(backend="gloo", timeout=WAIT))


def open_store(place: Place, *, serves: bool = False) -> distributed.Store:
    """Connect to the store through which the processes find each other.

    Args:
        place: Where it is.
        serves: Whether this process serves it: the main one does, if the launcher does not.

    Raises:
        RunError: If that fails.
    """
    where = f"{printable(place.address)}:{place.port}"
    try:
        return distributed.TCPStore(
            place.address,
            place.port,
            place.processes,
            is_master=serves,
            timeout=RENDEZVOUS,
            wait_for_workers=False,
            multi_tenant=serves,
        )
    except (RuntimeError, ValueError) as error:
        what = "open" if serves else "reach"
        raise RunError(
            f"rank {place.rank} could not {what} {where} (MASTER_ADDR, MASTER_PORT), where the processes of the run "
            f"find each other: {one_line(error)[:160]}"
        ) from error


def _check_in(store: distributed.Store, place: Place) -> None:
    """Wait for all processes, and compare how many each of them expects."""
    mine = json.dumps([platform.node(), place.processes])
    deadline = time.monotonic() + RENDEZVOUS.total_seconds()
    waited_for = 0
    try:
        store.set(_key(place.rank), mine)
        for waited_for in range(place.processes):
            store.wait([_key(waited_for)], timedelta(seconds=max(deadline - time.monotonic(), 1)))
            host, processes = json.loads(store.get(_key(waited_for)))
            if processes != place.processes:
                _wait_until_read(store, place, waited_for)
                raise RequestError(
                    f"host {printable(host)} (rank {waited_for}) was started with WORLD_SIZE {processes}, rank "
                    f"{place.rank} with {place.processes}; start every process with the same number"
                )
    except RuntimeError as error:
        raise RunError(
            f"rank {place.rank} waited for rank {waited_for} of {place.processes} at {printable(place.address)}:"
            f"{place.port}, which did not start within {RENDEZVOUS.total_seconds():.0f} s ({one_line(error)[:80]})"
        ) from error


def _key(rank: int) -> str:
    return f"resnext-hub/{rank}"


def _wait_until_read(store: distributed.Store, place: Place, other: int) -> None:
    """Keep the store open, if this is its process, until the other one has seen the difference as well."""
    with contextlib.suppress(RuntimeError):
        store.set(f"{_key(place.rank)}/read", "")
        if place.rank == 0:
            store.wait([f"{_key(other)}/read"], PARTING)
