"""A sign of life between the processes of a run: a host that drops off the network closes no connection.

Each process counts up a number in the store through which they found each other. The main process watches the numbers
of all others, and they watch its own, as the store is on its host.
"""

import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from torch import distributed

from resnext_hub.processes.launcher import Place
from resnext_hub.processes.peers import Peers, open_store
from resnext_hub.text import printable

BEAT = 5.0
"""Seconds between two signs of life."""

SILENCE = 45.0
"""Seconds without one after which a process counts as lost."""

_LEFT = "left"


@contextlib.contextmanager
def heartbeat(peers: Peers) -> Iterator[None]:
    """End this process with exit code 1 and one line if another one falls silent inside.

    It would wait for hours: what blocks it is a call into a library, which no exception can end.
    """
    if peers.size == 1:
        yield
        return
    store = open_store(Place.read())
    store.set_timeout(timedelta(seconds=SILENCE))
    store.set(_key(peers.rank), "")  # no number of an attempt before this one is left when the others look
    pulse = _Pulse(peers.rank, peers.gather(platform.node()), store)
    for work in (pulse.beat, pulse.watch):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        pulse.left.set()


class _Pulse:
    """What this process has heard of the others, and when."""

    def __init__(self, rank: int, hosts: list[str], store: distributed.Store) -> None:
        self.rank, self.hosts, self.store = rank, hosts, store
        self.left = threading.Event()
        watched = range(1, len(hosts)) if rank == 0 else range(1)
        self.seen = dict.fromkeys(watched, "")
        self.heard = dict.fromkeys(watched, time.monotonic())

    def beat(self) -> None:
        """Send signs of life, and listen for those of the others, until this process leaves or the store is gone."""
        with contextlib.suppress(RuntimeError):  # whatever breaks, `watch` hears nothing more
            count = 0
            while not self.left.wait(BEAT):
                count += 1
                self.store.set(_key(self.rank), str(count))
                for rank, before in list(self.seen.items()):
                    value = self.store.get(_key(rank)).decode()
                    if value == _LEFT:
                        del self.seen[rank], self.heard[rank]
                    elif value != before:
                        self.seen[rank], self.heard[rank] = value, time.monotonic()
            self.store.set(_key(self.rank), _LEFT)

    def watch(self) -> None:
        """End this process when another one has been silent for too long."""
        while not self.left.wait(BEAT):
            now = time.monotonic()
            silent = [rank for rank, at in list(self.heard.items()) if now - at > SILENCE]
            if silent:
                sys.stderr.write(
                    f"error: host {printable(self.hosts[silent[0]])} (rank {silent[0]}) has not answered for "
                    f"{SILENCE:.0f} s, so the run stops; rerun the same command to resume from the last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(1)


def _key(rank: int) -> str:
    return f"resnext-hub/beat/{rank}"
