"""How the processes of a run find each other: a key-value store at the address that the launcher gives.

torchrun keeps one store for all attempts of a run, and restarts processes on different hosts at different times. What
an earlier attempt left in the store, such as the addresses of its processes, must not mislead this one.
"""

import contextlib
import json
import os
import platform
import time
import uuid
from datetime import timedelta

from torch import distributed

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.processes.launcher import Place
from resnext_hub.text import printable

RENDEZVOUS = timedelta(minutes=5)
"""How long a process waits for the others to start."""

PARTING = timedelta(seconds=5)
"""How long the main process keeps the store open for others to read why the run cannot start."""

POLL = 0.05
"""Seconds between looks at who has arrived."""


def meet(place: Place) -> tuple[distributed.Store, str]:
    """Wait for all processes, and check that all expect the same number of them.

    Each process counts itself, and the main process answers every number with the name of its attempt. A process that
    gets an answer hence knows that the main process has started since.

    Returns:
        A store that only the processes of this attempt use, and the name of the attempt.

    Raises:
        RequestError: If they expect different numbers of processes.
        RunError: If the store cannot be reached, or the others do not start in time.
    """
    store = open_store(place, serves=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    deadline = time.monotonic() + RENDEZVOUS.total_seconds()
    waited_for = 0
    try:
        reception = _Reception(store, uuid.uuid4().hex) if place.rank == 0 else None
        attempt = _ask(store, deadline) if reception is None else reception.attempt
        shared = distributed.PrefixStore(attempt, store)
        shared.set(_key(place.rank), json.dumps([platform.node(), place.processes]))
        for waited_for in range(place.processes):
            if reception is not None:
                reception.wait(shared, _key(waited_for), deadline)
            shared.wait([_key(waited_for)], _left(deadline))
            host, processes = json.loads(shared.get(_key(waited_for)))
            if processes != place.processes:
                _wait_until_read(shared, place, waited_for)
                raise RequestError(
                    f"rank {waited_for} (host {printable(host)}) was started with WORLD_SIZE {processes}, but rank "
                    f"{place.rank} was started with {place.processes}; start every process with the same WORLD_SIZE"
                )
    except RuntimeError as error:
        raise RunError(
            f"rank {waited_for} of {place.processes} did not start within {RENDEZVOUS.total_seconds():.0f} s; rank "
            f"{place.rank} waited for it at {printable(place.address)}:{place.port} ({one_line(error)[:80]})"
        ) from error
    return shared, attempt


class _Reception:
    """The main process's side of a rendezvous.

    Args:
        store: The store of all attempts.
        attempt: Name of this one.
    """

    def __init__(self, store: distributed.Store, attempt: str) -> None:
        self.store, self.attempt = store, attempt
        self._answered = 0

    def wait(self, shared: distributed.Store, key: str, deadline: float) -> None:
        """Answer all who arrive until one of them has set a key, or the deadline has passed."""
        while not shared.check([key]) and time.monotonic() < deadline:
            arrived = self.store.add(_ARRIVALS, 0)
            for number in range(self._answered + 1, arrived + 1):
                self.store.set(_answer(number), self.attempt)
            self._answered = arrived
            time.sleep(POLL)


def _ask(store: distributed.Store, deadline: float) -> str:
    """Return the name of the main process's attempt, once it has started."""
    answer = _answer(store.add(_ARRIVALS, 1))
    store.wait([answer], _left(deadline))
    return str(store.get(answer).decode())


def open_store(place: Place, *, serves: bool = False) -> distributed.Store:
    """Return the key-value store through which the processes find each other.

    Args:
        place: Its address, and the rank of this process.
        serves: Whether this process serves it; the main process does, unless the launcher does.

    Raises:
        RunError: If it cannot be reached or opened.
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
        action = "open" if serves else "reach"
        raise RunError(
            f"rank {place.rank} could not {action} {where} (MASTER_ADDR, MASTER_PORT) for the rendezvous of the run's "
            f"processes: {one_line(error)[:160]}"
        ) from error


_ARRIVALS = "resnext-hub/arrivals"


def _answer(number: int) -> str:
    return f"resnext-hub/answer/{number}"


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 1))


def _key(rank: int) -> str:
    return f"resnext-hub/{rank}"


def _wait_until_read(store: distributed.Store, place: Place, other: int) -> None:
    """Keep the store open, if this process serves it, until the other one has seen the difference as well."""
    with contextlib.suppress(RuntimeError):
        store.set(f"{_key(place.rank)}/read", "")
        if place.rank == 0:
            store.wait([f"{_key(other)}/read"], PARTING)
