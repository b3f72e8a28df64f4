"""What a person sees of a run: on a terminal a progress bar for each epoch, otherwise a line every few seconds."""

import logging
import math
import os
import sys
import time
from typing import Any

from tqdm import tqdm

_logger = logging.getLogger(__name__)

PAUSE = 5.0
"""Least number of seconds from one line to the next, without a terminal."""

WIDTH = 120
"""Columns of a terminal that does not state its width, such as that of some containers."""


class Progress:
    """Progress of a run.

    Args:
        steps: Steps of the run.
        step: Step at which this process starts.
        per_epoch: Steps of an epoch.
        visible: Whether this process shows anything.
        right: What the fraction of images that are right is called.
    """

    def __init__(self, *, steps: int, step: int, per_epoch: float, visible: bool, right: str = "accuracy") -> None:
        self._name = right
        self._steps, self._step, self._per_epoch = steps, step, per_epoch
        self._visible, self._terminal = visible, visible and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._lines = self._loss = self._right = 0.0
        self._last = time.monotonic()
        self._begin_epoch()

    def advance(self) -> None:
        """Count a step."""
        self._step += 1
        if self._bar is not None:
            self._bar.update()
        if self._step >= self._end and self._step < self._steps:
            self._begin_epoch()

    def show(self, *, loss: float, top1: float, lr: float, speed: float, wait: float, seconds_left: float) -> None:
        """Show the figures of a step.

        Args:
            loss: Loss of its batch.
            top1: Accuracy on its batch, 0 to 1; with loss, it is averaged over the epoch so far.
            lr: Learning rate.
            speed: Images per second.
            wait: Fraction of the time in which training waited for images.
            seconds_left: Estimated seconds to the end of the run.
        """
        self._lines, self._loss, self._right = self._lines + 1, self._loss + loss, self._right + top1
        facts = (
            f"loss {self._loss / self._lines:.3f}, {self._name} {100 * self._right / self._lines:.1f} %, lr {lr:.2g}, "
            f"{speed:.0f} images/s, waiting {wait:.0%}, {clock(seconds_left)} left"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(facts)
        elif self._visible and time.monotonic() - self._last >= PAUSE:
            self._last = time.monotonic()
            _logger.info("step %d of %d: %s", self._step, self._steps, facts)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _begin_epoch(self) -> None:
        self.close()
        self._lines = self._loss = self._right = 0.0
        size = self._per_epoch
        number = int(self._step / size + 1e-9)
        begin, self._end = math.ceil(number * size), min(math.ceil((number + 1) * size), self._steps)
        if self._terminal:
            epochs = max(math.ceil((self._steps - 1) / size), 1)  # the last step completes an epoch
            self._bar = tqdm(
                total=self._end - begin,
                initial=self._step - begin,
                desc=f"epoch {number + 1}/{epochs}",
                unit="step",
                leave=False,
                bar_format="{desc}: {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt}{postfix}",
                dynamic_ncols=bool(os.get_terminal_size(sys.stderr.fileno()).columns),
                ncols=WIDTH,  # of a terminal that does not state its own
            )


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, or hours and minutes: 2:05 or 3 h 07 min."""
    minutes = round(seconds) // 60
    return f"{minutes}:{round(seconds) % 60:02}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
