"""A signal to stop, from a scheduler or from Ctrl-C, made into a step at which all processes stop.

The signal reaches the processes at different moments, and may reach one of them only. So each of them asks the others
after every step, over a group of its own that needs no work of an accelerator.
"""

import contextlib
import os
import signal
import sys
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed

GRACE = 30.0
"""Seconds that a stopped process waits for the others; launchers kill it about then."""

SAVING = 600.0
"""Seconds that it may take after that to save the state."""


class StopSignal:
    """Notes SIGTERM and Ctrl-C instead of dying of them, while it is entered; a second Ctrl-C is not waited for.

    A process that waits for another one which is gone never returns to Python, where signals are handled. So a thread
    ends it, if the processes do not come to stop together.

    Args:
        processes: How many processes work on the run.
        timeout: How long a process waits for the others' answers.
    """

    def __init__(self, processes: int, timeout: timedelta) -> None:
        self.requested = False
        self.number = signal.SIGTERM
        """The signal that came to this process, or is taken to have come to another."""
        self._group: Any = distributed.new_group(backend="gloo", timeout=timeout) if processes > 1 else None
        self._before: dict[signal.Signals, Any] = {}
        self._known, self._left = threading.Event(), threading.Event()

    def agreed(self) -> bool:
        """Return whether any process was asked to stop; every process has to ask, and gets the same answer."""
        if self._group is None:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        if flag.item():
            self.stopping()
        return bool(flag.item())

    def stopping(self) -> None:
        """Note that all processes have come to know that they stop; what is left is to save the state."""
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
            # written to by the C handler, at once, whatever the main thread does
            self._wakeup = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._left.set()
        if self._group is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._arrived)

    def _watch(self) -> None:
        """End the process where it was asked to stop and cannot."""
        number = _first_stop(self._arrivals)
        if number is None or self._left.is_set():
            return
        if self._known.wait(GRACE) and self._left.wait(SAVING):
            return
        if not self._left.is_set():
            sys.stderr.write(
                f"stopped by {signal.Signals(number).name} while waiting for another process of the run, which does "
                "not answer; rerun the same command to resume from the last checkpoint\n"
            )
            sys.stderr.flush()
            os._exit(128 + number)


def _first_stop(descriptor: int) -> int | None:
    """Wait for SIGTERM or Ctrl-C among the signals that arrive; None if the pipe is closed before."""
    with contextlib.closing(os.fdopen(descriptor, "rb", buffering=0)) as arrivals:
        while found := arrivals.read(1):
            if found[0] in (signal.SIGTERM, signal.SIGINT):
                return found[0]
    return None
