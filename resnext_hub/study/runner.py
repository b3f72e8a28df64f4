"""Train the runs of a study, each in a process of its own: an ordinary training run that resumes if it was killed."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

import yaml
from filelock import FileLock, Timeout

from resnext_hub.errors import RequestError, StoppedRun
from resnext_hub.files import write_atomic
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder, RunLock
from resnext_hub.study.members import Member
from resnext_hub.study.plan import Shard, Study
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between looks at the processes."""

GRACE = 60
"""Seconds that stopped runs get to save their state."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not finish."""

    run: str
    """Name of its folder."""
    attempts: int
    reason: str
    """The last line of its output."""

    @property
    def tries(self) -> str:
        """Number of attempts, in words."""
        return "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"


@dataclass
class _Job:
    member: Member
    seed: int
    attempts: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    output: "IO[bytes] | None" = None
    started: float = field(default=0.0)


def train_runs(study: Study, shard: Shard) -> list[Failure]:
    """Train every run of a shard that is not finished; return those that failed in spite of retries.

    Raises:
        RequestError: If another process runs this shard.
        StoppedRun: After SIGTERM or Ctrl-C, when the runs have saved their state.
    """
    lock = FileLock(study.folder.lock(shard), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(f"{printable(study.folder)} is in use by another process; wait for it to end") from None
    with contextlib.closing(_Runner(study, shard)) as runner:
        try:
            return runner.run()
        finally:
            lock.release()


def finished_record(folder: RunFolder) -> RunRecord | None:
    """Return the record of a finished run, or None."""
    return RunRecord.load(folder.record) if os.path.lexists(folder.record) else None


class _Runner:
    """Keeps up to `jobs` processes running until no run is left."""

    def __init__(self, study: Study, shard: Shard) -> None:
        self._study = study
        self._all = study.part(shard)
        self._waiting = [_Job(member, seed) for member, seed in self._all if not self._finished(member, seed)]
        self._running: list[_Job] = []
        self._failures: list[Failure] = []
        self._signal: signal.Signals | None = None

    def run(self) -> list[Failure]:
        """Train all waiting runs; return those that failed in spite of retries.

        Raises:
            StoppedRun: After SIGTERM or Ctrl-C.
        """
        done = len(self._all) - len(self._waiting)
        if done:
            _logger.info("%d of %d runs are already finished", done, len(self._all))
        with self._stop_on_signals():
            while (self._waiting or self._running) and self._signal is None:
                while self._waiting and len(self._running) < self._study.jobs:
                    self._start(self._waiting.pop(0))
                time.sleep(POLL)
                for job in [job for job in self._running if job.process is not None and job.process.poll() is not None]:
                    self._running.remove(job)
                    self._finish(job)
            if self._signal is not None:
                self.close()
                raise StoppedRun(
                    f"stopped by {self._signal.name}; {len(self._all) - len(self._waiting) - len(self._running)} of "
                    f"{len(self._all)} runs are finished: rerun the same command to resume",
                    self._signal,
                )
        return self._failures

    def close(self) -> None:
        """Ask the running processes to save their state and end; kill those that do not."""
        for job in self._running:
            assert job.process is not None
            with contextlib.suppress(ProcessLookupError):
                job.process.terminate()
        end = time.monotonic() + GRACE
        for job in self._running:
            assert job.process is not None
            try:
                job.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            self._close_output(job)

    def _finished(self, member: Member, seed: int) -> bool:
        return finished_record(self._study.folder.run(member.slug, seed)) is not None

    def _start(self, job: _Job) -> None:
        folder = self._study.folder.run(job.member.slug, job.seed)
        self._await_orphan(folder)
        settings = folder.path.with_suffix(".yaml")
        write_atomic(
            settings,
            yaml.safe_dump(self._study.run_settings(job.member, job.seed), sort_keys=False, allow_unicode=True),
        )
        job.attempts += 1
        job.started = time.monotonic()
        job.output = open(self._study.folder.log(job.member, job.seed), "ab")  # noqa: SIM115 - closed with the process
        job.process = subprocess.Popen(
            [sys.executable, "-m", "resnext_hub", "train", "--config", str(settings), "--output-dir", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=job.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then asks the runs to stop
        )
        self._running.append(job)
        _logger.info("%s: training%s", folder.path.name, "" if job.attempts == 1 else f", attempt {job.attempts}")

    def _await_orphan(self, folder: RunFolder) -> None:
        """Wait for a run that outlived a killed study; it ends with the state that would be trained now."""
        told = False
        while folder.path.is_dir() and self._signal is None:
            try:
                with RunLock(folder):
                    return
            except RequestError:
                if not told:
                    _logger.info("%s: waiting for the process that trains it", folder.path.name)
                told = True
                time.sleep(POLL)

    def _finish(self, job: _Job) -> None:
        assert job.process is not None
        self._close_output(job)
        folder = self._study.folder.run(job.member.slug, job.seed)
        code = job.process.returncode
        record = finished_record(folder) if code == 0 else None
        if record is not None:
            final = record.evaluation
            _logger.info(
                "%s: accuracy %.2f %% (%d/%d), %.0f s",
                folder.path.name,
                100 * final.top1,
                final.correct,
                final.count,
                time.monotonic() - job.started,
            )
            return
        reason = _last_line(self._study.folder.log(job.member, job.seed)) or f"exit code {code}"
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        if code != 2 and job.attempts <= self._study.config.retries:
            _logger.warning("%s: %s; trying again", folder.path.name, reason)
            self._waiting.insert(0, job)
            return
        failure = Failure(run=folder.path.name, attempts=job.attempts, reason=reason)
        _logger.error("%s: %s; %s", failure.run, reason, failure.tries)
        self._failures.append(failure)

    def _close_output(self, job: _Job) -> None:
        if job.output is not None:
            job.output.close()

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _last_line(path: "os.PathLike[str]") -> str:
    """Return the last line of a run's output, at most 300 characters."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return printable(lines[-1].removeprefix("error: "))[:300] if lines else ""
