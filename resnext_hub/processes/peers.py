"""Agreement between the processes of a run, and propagation of errors from one to all of them.

Each process has its own command line, disk and packages, which may differ between hosts. Before the first step the
processes compare everything that determines the run. If one fails, the others are notified and stop as well.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from resnext_hub.errors import RequestError, RunError, failed_system_call, one_line
from resnext_hub.machine import device_type
from resnext_hub.processes.launcher import WAIT, Place
from resnext_hub.processes.rendezvous import meet
from resnext_hub.text import printable

MAX_NAMED = 4
"""Number of differing settings that a message names."""

T = TypeVar("T")


class Peers:
    """The processes of a run; with one process, every method is a plain function call.

    All processes make the same calls in the same order. A process that fails reports it in place of its next call, and
    the others fail in theirs.

    Args:
        rank: Index of this process; 0 is the main process.
        size: Number of processes.
        group: A gloo group of all of them, for CPU tensors.
        attempt: Name of this attempt in the store of the run, see `rendezvous.meet`.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, attempt: str = "") -> None:
        self.rank, self.size, self.attempt = rank, size, attempt
        self._group = group
        self._failed = False

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which makes decisions and writes files."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Run a function in every process; return this process's result once all have succeeded.

        Raises:
            RequestError: In every process, if any raised it.
            RunError: In every process, if any raised it or an OSError.
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
            raise failure  # the others know of a failure already
        reports = self._gather(None if failure is None else _Failure.of(failure))
        self._require_success(reports, failure)
        return result

    def from_main(self, work: Callable[[], T]) -> T:
        """Run a function in the main process only; return its result in every process."""
        done = self.together(lambda: [work()] if self.is_main else [])
        if self.size == 1:
            return done[0]
        box: list[Any] = done or [None]
        with lost_peers(self.rank, self.size):
            distributed.broadcast_object_list(box, src=0, group=self._group)
        result: T = box[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, ordered by rank."""
        return [value] if self.size == 1 else self._gather(value)

    def agree(self, work: Callable[[], T], facts: Callable[[T], Mapping[str, object]]) -> T:
        """Run a function in every process; return this process's result once the facts about all results agree.

        Args:
            work: The function.
            facts: Returns the facts about a result, by the name that messages use.

        Raises:
            RequestError: In every process, if the facts differ; the message names the host, the fact and both values.
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
        """Load tensors in the main process; return them in every process, on the CPU. They are sent one by one."""
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
        """Wait until all processes know; the first to end would otherwise break the connections of the others."""
        with contextlib.suppress(RuntimeError):
            distributed.barrier(group=self._group)


@dataclass(frozen=True)
class _Failure:
    """An error of a process."""

    host: str
    text: str
    wrong_request: bool

    @classmethod
    def of(cls, error: RequestError | RunError) -> "_Failure":
        """Return a description of an error of this process."""
        return cls(platform.node(), error.message, isinstance(error, RequestError))


def _difference(found: list[tuple[str, dict[str, object]]]) -> str | None:
    """Describe in one line how the first process that differs from the main one differs; None if none does."""
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
    shown = [f"{name} {_shown(facts.get(name))}, but rank 0 has {_shown(main[name])}" for name in names[:MAX_NAMED]]
    more = [f"{len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    count = len(differing) - 1
    others = f" ({count} more {'process differs' if count == 1 else 'processes differ'})" if count else ""
    return (
        f"host {printable(host)} (rank {rank}) has {'; '.join(shown + more)}{others}; start every process with the "
        "same settings, dataset and package versions"
    )


def _shown(value: object) -> str:
    text = printable("none" if value is None else str(value))
    return text if len(text) <= 100 else f"{text[:97]}…"


@contextlib.contextmanager
def lost_peers(rank: int, size: int) -> Iterator[None]:
    """Turn a broken connection to another process into a one-line RunError."""
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if size == 1 or not lost:
            raise
        raise RunError(
            f"process {rank} lost the connection to another process of the run ({one_line(error)[:120]}); see that "
            "process's output, and rerun the same command to resume from the last checkpoint"
        ) from error


def join() -> Peers:
    """Join the process group of the processes that the launcher started.

    Raises:
        RequestError: If variables of the launcher are wrong or differ between processes.
        RunError: If other processes do not start in time.
    """
    place = Place.read()
    if place.processes == 1:
        return Peers()
    store, attempt = meet(place)
    device = device_type()
    backend = "gloo" if device == "cpu" else distributed.get_default_backend_for_device(device)
    with lost_peers(place.rank, place.processes):
        distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.processes, timeout=WAIT)
        return Peers(place.rank, place.processes, distributed.new_group(backend="gloo", timeout=WAIT), attempt)
