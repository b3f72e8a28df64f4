"""Wall time and throughput of a run."""

import contextlib
import time
from collections.abc import Iterator


class Timer:
    """Wall time of a run, training speed between log lines, and the fraction of time spent waiting for data.

    Args:
        wall_before: Wall time of the run before this process, in seconds.
        step: Step at which this process starts.
    """

    def __init__(self, wall_before: float, step: int) -> None:
        now = time.monotonic()
        self._start = now - wall_before
        self._checkpoint = self._lap = now
        self._step = step
        self._waited = self._apart = 0.0
        self.evaluation = 0.0
        """Seconds that the last evaluation took."""

    @property
    def wall_seconds(self) -> float:
        """Wall time of the run so far in seconds, over all resumes."""
        return round(time.monotonic() - self._start, 3)

    @property
    def since_checkpoint(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self._checkpoint

    def checkpointed(self) -> None:
        """Note that a checkpoint was written."""
        self._checkpoint = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Exclude the time inside, such as for evaluation and saving, from the training speed."""
        begin = time.monotonic()
        yield
        self._apart += time.monotonic() - begin

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time an evaluation, and exclude it from the training speed."""
        begin = time.monotonic()
        with self.apart():
            yield
        self.evaluation = time.monotonic() - begin

    def restart(self, step: int) -> float:
        """Start a new lap at a step; return the seconds of the old one, which do not count."""
        before = self._lap + self._apart
        self.lap(step, 0)
        return self._lap - before

    def lap(self, step: int, batch_size: int) -> tuple[float, float]:
        """Start a new lap; return images per second and the fraction of time spent waiting for data in the old one."""
        now = time.monotonic()
        spent = max(now - self._lap - self._apart, 1e-9)
        speed, wait = (step - self._step) * batch_size / spent, self._waited / spent
        self._lap, self._step, self._waited, self._apart = now, step, 0.0, 0.0
        return round(speed, 2), round(wait, 4)
