"""Stop all processes of a run at the same step after SIGTERM or Ctrl-C.

The signal reaches the processes at different times, and possibly only one of them. So they share the flag after every
step, over a gloo group of their own that does not involve the accelerator.
"""

import os
import signal
import sys
import threading
from datetime import timedelta
from types import FrameType
from typing import IO, Any

import torch
from torch import distributed

GRACE = 30.0
"""Seconds that a process waits for the others after a signal; launchers send SIGKILL at about that time."""

SAVING = 600.0
"""Seconds that it may then take to save the state."""


class StopSignal:
    """A context in which SIGTERM and Ctrl-C only set a flag; a second Ctrl-C raises KeyboardInterrupt.

    A process that waits for one that is gone never returns to Python, where signals are handled. So a thread ends the
    process if the processes do not agree to stop in time.

    Args:
        processes: Number of processes of the run.
        timeout: How long a process waits for the others to answer.
    """

    def __init__(self, processes: int, timeout: timedelta) -> None:
        self.requested = False
        self.number = signal.SIGTERM
        """The signal that this process received; SIGTERM if another process received one."""
        self._group: Any = distributed.new_group(backend="gloo", timeout=timeout) if processes > 1 else None
        self._before: dict[signal.Signals, Any] = {}
        self._known, self._left = threading.Event(), threading.Event()

    def agreed(self) -> bool:
        """Return whether any process was asked to stop; all processes must call it, and get the same answer."""
        if self._group is None:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        if flag.item():
            self.stopping()
        return bool(flag.item())

    def request(self) -> None:
        """Ask all processes to stop at the same step."""
        self.requested = True

    def stopping(self) -> None:
        """Note that all processes know that they stop, and only the state is left to save."""
        self._known.set()

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.number = signal.Signals(signal_number)

    def __enter__(self) -> "StopSignal":
        if self._group is not None:
            self._arrivals, self._arrived = os.pipe()
            os.set_blocking(self._arrived, False)
            # the C signal handler writes to it at once, whatever the main thread is doing
            self._wakeup = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._arrived)
        self._left.set()

    def _watch(self) -> None:
        """End the process if it was asked to stop and is blocked."""
        with open(self._arrivals, "rb", buffering=0) as arrivals:  # open to the end, because more signals may arrive
            number = _first_stop(arrivals)
            if number is not None:
                self._require_end(number)

    def _require_end(self, number: int) -> None:
        """End the process unless the processes agree to stop in time."""
        if self._known.wait(GRACE) and self._left.wait(SAVING):
            return
        if not self._left.is_set():
            sys.stderr.write(
                f"stopped by {signal.Signals(number).name} while waiting for another process of the run, which does "
                "not respond; rerun the same command to resume from the last checkpoint\n"
            )
            sys.stderr.flush()
            os._exit(128 + number)


def _first_stop(arrivals: IO[bytes]) -> int | None:
    """Wait for SIGTERM or Ctrl-C among the signals that arrive; return None if the pipe is closed first."""
    while found := arrivals.read(1):
        if found[0] in (signal.SIGTERM, signal.SIGINT):
            return found[0]
    return None
