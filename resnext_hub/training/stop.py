"""A signal to stop, from a scheduler or from Ctrl-C, made into a step at which all processes stop.

The signal reaches the processes at different moments, and may reach one of them only. So each of them asks the others
after every step, over a group of its own that needs no work of an accelerator.
"""

import signal
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed


class StopSignal:
    """Notes SIGTERM and Ctrl-C instead of dying of them, while it is entered; a second Ctrl-C is not waited for.

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

    def agreed(self) -> bool:
        """Say whether any process was asked to stop; every process has to ask, and gets the same answer."""
        if self._group is None:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.number = signal.Signals(signal_number)

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
