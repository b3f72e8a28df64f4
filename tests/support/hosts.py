"""Hosts for tests: network namespaces on one switch, each with a host name and a disk of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import warm_start
from support.processes import ROOT

ENTER = """
import ctypes, os, platform, runpy, socket, sys
namespace, name, disk, place, *words = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if getattr(libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), function)
NEWNET, NEWUTS, NEWNS, BIND, RECURSIVE_PRIVATE = 0x40000000, 0x04000000, 0x00020000, 4096, 16384 | 1 << 18
with open(f"/var/run/netns/{namespace}") as file:
    call("setns", file.fileno(), NEWNET)
call("unshare", NEWUTS | NEWNS)
socket.sethostname(name)
platform._uname_cache = None  # of the process that this one was forked from
call("mount", b"none", b"/", None, RECURSIVE_PRIVATE, None)
call("mount", os.fsencode(disk), os.fsencode(place), None, BIND, None)
os.chdir(place)
sys.path[0] = os.path.dirname(words[0]) if words[0] != "-m" else ""
sys.argv = words if words[0] != "-m" else words[1:]
if words[0] == "-m":
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(words[0], run_name="__main__")
"""
"""Enters a network namespace, takes a host name, mounts a disk at the place where every host has it, and runs words."""


@dataclass(frozen=True)
class Host:
    """A host."""

    rank: int
    namespace: str
    address: str
    disk: Path
    place: Path
    """Where processes of the host see its disk; the same path on all hosts."""

    @property
    def name(self) -> str:
        """Its host name."""
        return f"host-{self.rank}"

    def start(self, words: Sequence[object], **environment: str) -> "subprocess.Popen[str]":
        """Start Python with a script, or with `-m` and a module, in the folder of the disk."""
        usual = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)}
        entering = ["-c", ENTER, self.namespace, self.name, str(self.disk), str(self.place)]
        return warm_start.Popen(
            [sys.executable, *entering, *map(str, words)],
            env=os.environ | usual | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextmanager
def connected_hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """Connect hosts by a switch; skip the test where that is not allowed."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need ip and root")
    own = f"rh{os.getpid()}"
    switch = f"{own}s"
    place = folder / "disk"
    hosts = [Host(n, f"{own}h{n}", f"10.213.78.{n + 1}", folder / f"disk-{n}", place) for n in range(count)]
    for path in (place, *(host.disk for host in hosts)):
        path.mkdir()
    made = [["ip", "netns", "add", name] for name in (switch, *(host.namespace for host in hosts))]
    made += [["ip", "-n", switch, "link", "add", "br0", "type", "bridge"]]
    made += [["ip", "-n", switch, "link", "set", "br0", "up"]]
    for host in hosts:
        port = f"port{host.rank}"
        ends = ["name", "eth0", "netns", host.namespace, "type", "veth", "peer", "name", port, "netns", switch]
        made += [["ip", "link", "add", *ends]]
        made += [["ip", "-n", switch, "link", "set", port, "master", "br0", "up"]]
        made += [["ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0"]]
        made += [["ip", "-n", host.namespace, "link", "set", link, "up"] for link in ("lo", "eth0")]
    try:
        for words in made:
            if (done := subprocess.run(words, capture_output=True, text=True, check=False)).returncode:
                pytest.skip(f"no network namespaces here: {' '.join(words)}: {done.stderr.strip()}")
        yield hosts
    finally:
        for name in (switch, *(host.namespace for host in hosts)):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
