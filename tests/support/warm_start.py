"""Start Python processes in which torch and the other libraries are imported already: fork them from a server.

Usage: `Popen`, in place of `subprocess.Popen`. The processes are children of the one that asks for them, with the given
words, variables, folder, files and session; signals and exit codes are the kernel's. What they share with each other,
and processes of their own interpreters do not, is the seed of Python's string hashes.

A process gets an interpreter of its own where an option of the interpreter, or a variable that libraries read when they
are imported, differs from the server's. For variables of the Hub's clients there is a second server, which has not
imported these. Nothing of this package is imported by either.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

COMMON = (
    "torch",
    "torch._dynamo",
    "torch._inductor.config",
    "torch.distributed.launcher.api",
    "torch.distributed.tensor",
    "torchvision",
    "scipy.stats",
    "pandas",
    "pyarrow.parquet",
    "sklearn.metrics",
    "sklearn.datasets",
    "sklearn.model_selection",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.WebPImagePlugin",
    "jinja2",
    "yaml",
    "fsspec",
    "dill",
    "msgspec.json",
    "multiprocess",
    "tqdm.auto",
    "tqdm.contrib.logging",
    "simplejpeg",
)
"""Modules that both servers import."""

HUB_CLIENTS = ("huggingface_hub", "safetensors.torch", "timm", "timm.optim", "datasets", "accelerate")
"""Modules that one of them imports as well: they read addresses and folders from variables when they are imported."""

READ_LATE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR"),
    *("MASTER_PORT", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "GLOO_SOCKET_IFNAME"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "RESNEXT_HUB_", "PYTEST_", "TMPDIR", "OMP_NUM_THREADS"),
    *("TRACKIO_", "WANDB_", "MLFLOW_"),
)
"""Beginnings of variables that are read when they are used; libgomp is told of OMP_NUM_THREADS."""

READ_BY_HUB_CLIENTS = ("HF_", "NO_PROXY")
"""Beginnings of variables that the Hub's clients read when they are imported."""

LAUNCHERS = (["torch.distributed.run"], ["accelerate.commands.launch"], ["resnext_hub", "study"])
"""Modules, or commands of one, that start processes themselves, which a server of their own forks for them."""

NAME = "warm_start"
"""What servers are called in lists of processes; it has to be far from what a test looks for."""

ROOM = 8192
"""Bytes of words that a list of processes can show of a forked process."""

PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):
    """A process that a server forks where it can, and an interpreter of its own elsewhere."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, *rest: Any) -> None:
        pass_fds, cwd, env, _startupinfo, _flags, shell, *pipes_and_more = rest
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _restore, *user, new_session, group = pipes_and_more
        environment = dict(os.environ if env is None else env)
        plain = not (executable or preexec_fn or pass_fds or shell) and close_fds and group == -1
        plain = plain and not isinstance(args, (str, bytes, os.PathLike)) and user == [None, None, None, -1]
        words = [os.fsdecode(word) for word in args] if plain else []
        files = [given if given != -1 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        server = _server_for(words, environment, files) if plain else None
        if server is None:
            return super()._execute_child(args, executable, preexec_fn, close_fds, *rest)
        folder = os.path.abspath(cwd or ".")
        request = {"words": words[1:], "environment": environment, "folder": folder, "session": bool(new_session)}
        self.pid = server.fork(request, files)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        return None


def run(words: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Do what `subprocess.run` does with captured text and no check, in a forked process."""
    timeout = options.pop("timeout", None)
    with Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


class Server:
    """The side of a server that asks."""

    def __init__(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._connection = connection
        self.environment = dict(environment)
        """The variables under which it imported its modules."""

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Fork a process, which becomes a child of this one; return its PID."""
        content = json.dumps({**request, "parent": os.getpid()}).encode()
        with _adopting():
            socket.send_fds(self._connection, [struct.pack("<I", len(content))], list(files))
            self._connection.sendall(content)
            answer = self._connection.recv(4)
        if len(answer) < 4:
            raise RuntimeError("the server of warm processes has ended")
        return int(struct.unpack("<I", answer)[0])

    def close(self) -> None:
        """Let the server end, as soon as it has imported its modules."""
        self._connection.close()


_servers: dict[str, Server] = {}
"""By kind, those of this process."""


def _server_for(words: Sequence[str], environment: Mapping[str, str], files: Sequence[int]) -> Server | None:
    """Return the server that can fork a process like this one, if any."""
    if sys.platform != "linux" or words[0] != sys.executable or any(os.isatty(number) for number in files):
        return None
    options = words[1:3]
    options = options[1:] if options[:1] == ["-u"] else options
    if not options or (options[0].startswith("-") and options[0] not in ("-c", "-m")):
        return None
    if not _servers:
        _start_servers()
    server = _servers["all"]
    ours = server.environment
    changed = {name for name in ours.keys() | environment.keys() if ours.get(name) != environment.get(name)}
    changed = {name for name in changed if not name.startswith(READ_LATE)}
    if not changed:
        return server
    return _servers["common"] if all(name.startswith(READ_BY_HUB_CLIENTS) for name in changed) else None


def _start_servers() -> None:
    ends = {kind: socket.socketpair() for kind in ("common", "all")}
    theirs = [end[1].fileno() for end in ends.values()]
    words = [sys.executable, __file__, *map(str, theirs), " " * ROOM]
    process = subprocess.Popen(words, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    atexit.register(_end_servers, process)
    for kind, (ours, other) in ends.items():
        other.close()
        _servers[kind] = Server(ours, os.environ)


def _end_servers(process: "subprocess.Popen[bytes]") -> None:
    for server in _servers.values():
        server.close()
    process.wait()


@contextmanager
def _adopting() -> Iterator[None]:
    """Become the parent of processes below this one that lose theirs."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork processes until the other side is gone; return only in these, what they were asked to run."""
    gc.collect()
    gc.freeze()
    _show_words([NAME])
    while True:
        length, files, _, _ = socket.recv_fds(connection, 4, 3)
        if not length:
            os._exit(0)
        content = _receive(connection, struct.unpack("<I", length)[0])
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            request = json.loads(content)
            _become(request, files, between=os.getppid())
            connection.sendall(struct.pack("<I", os.getpid()))
            connection.close()
            return request
        for number in files:
            os.close(number)
        os.waitpid(between, 0)


def _receive(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = connection.recv(count - len(content))
        if not part:
            os._exit(0)
        content += part
    return content


def _become(request: Mapping[str, Any], files: Sequence[int], between: int) -> None:
    """Take on what an own interpreter would have been started with."""
    deadline = time.monotonic() + 10
    while os.getppid() != request["parent"]:  # until the process between has ended
        if time.monotonic() > deadline:
            os._exit(70)
        time.sleep(0.0002)
    if request["session"]:
        os.setsid()
    else:
        os.setpgid(0, os.getpgid(request["parent"]))
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(request["folder"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _show_words([sys.executable, *request["words"]])

    import tempfile

    import numpy as np
    import torch

    tempfile.tempdir = None
    np.random.seed()  # Python's own generator does so after a fork
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads != before:
        torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))


def _show_words(words: Sequence[str]) -> None:
    """Write words over those in the memory that lists of processes read."""
    fields = _content("/proc/self/stat").rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    content = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


def run_words(words: list[str]) -> None:
    """Run a script, a module or code, as the interpreter does with these words."""
    if words[0] == "-u":
        words = words[1:]
        for name, number in (("stdout", 1), ("stderr", 2)):
            shown = getattr(sys, name)
            raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for the rest of the process
            fresh = io.TextIOWrapper(raw, shown.encoding, shown.errors, newline="\n", write_through=True)
            setattr(sys, name, fresh)
            setattr(sys, f"__{name}__", fresh)
    kind = words[0] if words[0] in ("-c", "-m") else ""
    rest = words[1:] if kind else words
    sys.orig_argv = [sys.executable, *words]
    if kind == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = "" if kind else os.path.dirname(os.path.realpath(rest[0]))
    sys.argv = ["-c", *rest[1:]] if kind else rest
    main = type(sys)("__main__")
    main.__builtins__ = __builtins__
    if not kind:
        main.__file__ = os.path.abspath(rest[0])
    sys.modules["__main__"] = main
    code = compile(rest[0], "<string>", "exec") if kind else compile(_content(rest[0]), main.__file__, "exec")
    exec(code, main.__dict__)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def end(work: Callable[[list[str]], None], words: list[str]) -> NoReturn:
    """Work, and end the process as the interpreter does, but for tearing down the modules that the server imported."""
    code = 0
    try:
        work(words)
    except SystemExit as stopped:
        if isinstance(stopped.code, int):
            code = stopped.code & 0xFF
        elif stopped.code is not None:
            print(stopped.code, file=sys.stderr)
            code = 1
    except BaseException as error:  # noqa: BLE001 - the interpreter, too, ends with any
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        del trace
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    gc.collect()  # which leaves what the server had imported alone
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve_launcher(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Start a server beneath a launcher, which knows it as `subprocess.Popen`; return only in what that forks."""
    ours, other = socket.socketpair()
    if not os.fork():
        ours.close()
        os.setpgid(0, 0)  # what a terminal sends to the launcher is not meant for it
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        return serve(other)
    other.close()
    _servers["all"] = _servers["common"] = Server(ours, request["environment"])
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = Popen  # type: ignore[misc]
    return None


def main() -> None:
    """Import the modules, serve, and run what was asked for in the forked processes."""
    common, everything = (socket.socket(fileno=int(word)) for word in sys.argv[1:3])
    sys.path.pop(0)
    sys.path.insert(0, "")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in COMMON:
        importlib.import_module(name)
    if os.fork():
        everything.close()
        request = serve(common)
    else:
        common.close()
        for name in HUB_CLIENTS:
            importlib.import_module(name)
        request = serve(everything)
    while request["words"][0] == "-m" and any(request["words"][1:][: len(words)] == words for words in LAUNCHERS):
        forked = _serve_launcher(request)
        if forked is None:
            break
        request = forked
    end(run_words, request["words"])


if __name__ == "__main__":
    # under its own name, so that what it keeps outlives __main__, which a process replaces by its own
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    module = importlib.import_module("support.warm_start")
    sys.path.pop(0)
    module.main()
