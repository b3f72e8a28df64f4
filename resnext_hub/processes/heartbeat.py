"""Heartbeats between the processes of a run, because a host that drops off the network closes no connection.

Each process increments a counter in the store of the run. The main process, whose host serves the store, watches the
counters of all others; they watch its counter.
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
from resnext_hub.processes.peers import Peers
from resnext_hub.processes.rendezvous import open_store
from resnext_hub.text import printable

BEAT = 5.0
"""Seconds between heartbeats."""

SILENCE = 45.0
"""Seconds without a heartbeat after which a process counts as lost."""

_LEFT = "left"


@contextlib.contextmanager
def heartbeat(peers: Peers) -> Iterator[None]:
    """End this process with one line and exit code 1 if another one is lost.

    It could otherwise wait for hours in a library call, which an exception cannot interrupt.
    """
    if peers.size == 1:
        yield
        return
    store = distributed.PrefixStore(peers.attempt, open_store(Place.read()))
    store.set_timeout(timedelta(seconds=SILENCE))
    store.set(_key(peers.rank), "")
    pulse = _Pulse(peers.rank, peers.gather(platform.node()), store)
    for work in (pulse.beat, pulse.watch):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        pulse.left.set()


class _Pulse:
    """Heartbeats of this process, and when it last heard those of the others."""

    def __init__(self, rank: int, hosts: list[str], store: distributed.Store) -> None:
        self.rank, self.hosts, self.store = rank, hosts, store
        self.left = threading.Event()
        watched = range(1, len(hosts)) if rank == 0 else range(1)
        self.seen = dict.fromkeys(watched, "")
        self.heard = dict.fromkeys(watched, time.monotonic())

    def beat(self) -> None:
        """Send heartbeats and read those of the others, until this process leaves or the store is gone."""
        with contextlib.suppress(RuntimeError):  # if the store is gone, `watch` sees no more heartbeats
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
        """End this process if another one has been silent for too long."""
        while not self.left.wait(BEAT):
            now = time.monotonic()
            silent = [rank for rank, at in list(self.heard.items()) if now - at > SILENCE]
            if silent:
                sys.stderr.write(
                    f"error: host {printable(self.hosts[silent[0]])} (rank {silent[0]}) has not responded for "
                    f"{SILENCE:.0f} s, so the run stops; rerun the same command to resume from the last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(1)


def _key(rank: int) -> str:
    return f"resnext-hub/beat/{rank}"
