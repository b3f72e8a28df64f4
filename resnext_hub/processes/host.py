"""Work that one process of each host does for the others on it, which map its result into their memory."""

import contextlib
import logging
import mmap
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from resnext_hub.errors import one_line
from resnext_hub.processes.launcher import local_processes, local_rank
from resnext_hub.processes.peers import Peers

_logger = logging.getLogger(__name__)

_ALIGNED = 64
"""Multiple of bytes at which arrays start, as Arrow recommends."""

T = TypeVar("T")


def once_per_host(peers: Peers, work: Callable[[], T]) -> T:
    """Run a function in one process of each host; return its result in all of them.

    Arrays and Arrow tables in the result are mapped from one file, so that their memory is shared. If a process cannot
    map the file, it runs the function itself.

    Args:
        peers: The processes of the run.
        work: The function; its result can be pickled, and only trusted processes of this run read it.

    Raises:
        RequestError: In every process, if any raised it.
        RunError: In every process, if any raised it or an OSError.
    """
    if peers.size == 1:
        return work()
    rank, shared = local_rank(), local_processes() > 1
    with contextlib.ExitStack() as stack:

        def lead() -> tuple[T, Path | None]:
            result = work()
            if not shared:
                return result, None
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="resnext-hub-"))
                write_shared(path := Path(folder) / "shared", result)
            except OSError as error:
                _logger.warning("the processes of this host cannot share the dataset: %s", one_line(error))
                return result, None
            return result, path

        led = peers.together(lambda: lead() if rank == 0 else None)
        path = peers.gather(None if led is None else led[1])[peers.rank - rank]

        def follow() -> T:
            with contextlib.suppress(OSError):
                if path is not None:
                    mapped: T = read_shared(path)
                    return mapped
            return work() if led is None else led[0]

        return peers.together(follow)


def write_shared(path: Path, value: object) -> None:
    """Write a value to a file: its objects as a pickle, then the content of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    objects = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(objects), *(buffer.raw() for buffer in buffers)]
    with open(path, "xb") as file:
        file.write(struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts)))
        for part in parts:
            file.write(bytes(-file.tell() % _ALIGNED))
            file.write(part)


def read_shared(path: Path) -> Any:
    """Return a value that `write_shared` wrote; its arrays are mapped, and copied where they are changed."""
    with open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    (count,) = struct.unpack_from("<q", content)
    parts, place = list[memoryview](), 8 * (count + 1)
    for length in struct.unpack_from(f"<{count}q", content, 8):
        place += -place % _ALIGNED
        parts.append(content[place : place + length])
        place += length
    objects, *buffers = parts
    return pickle.loads(objects, buffers=buffers)
