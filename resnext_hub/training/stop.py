"""SIGTERM, as schedulers and preempted machines send it, made into a step at which all processes stop.

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
    """Notes SIGTERM instead of dying of it, while it is entered.

    Args:
        processes: How many processes work on the run.
        timeout: How long a process waits for the others' answers.
    """

    def __init__(self, processes: int, timeout: timedelta) -> None:
        self.requested = False
        self._group: Any = distributed.new_group(backend="gloo", timeout=timeout) if processes > 1 else None
        self._before: Any = None

    def agreed(self) -> bool:
        """Say whether any process was asked to stop; every process has to ask, and gets the same answer."""
        if self._group is None:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> "StopSignal":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
