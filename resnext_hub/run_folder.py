"""Paths in a run folder, and the lock that reserves the folder for one process."""

import errno
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from resnext_hub.errors import RequestError, setting
from resnext_hub.files import sha256_of
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Paths in the folder of a run; nothing is created or checked."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """Resolved settings, in YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Metrics of training and evaluation, in JSON Lines."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Model folder, ready to publish."""
        return self.path / "model"

    @property
    def plots(self) -> Path:
        """Folder of plots."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """Folder of the report, which `resnext-hub report` writes; removed with the plots if the run is extended."""
        return self.plots / "report"

    @property
    def trackers(self) -> Path:
        """Folder of experiment trackers that store their files with the run."""
        return self.path / "trackers"

    @property
    def predictions(self) -> Path:
        """Predictions for the evaluation split, in Parquet."""
        return self.path / "predictions.parquet"

    @property
    def test_predictions(self) -> Path:
        """Predictions for the test split, if there is one, in Parquet."""
        return self.path / "test-predictions.parquet"

    @property
    def confusion(self) -> Path:
        """Confusion matrices of the evaluation and the test split, in Parquet; none with several labels per image."""
        return self.path / "confusion.parquet"

    @property
    def record(self) -> Path:
        """Facts of a finished run, in JSON; written last."""
        return self.path / "record.json"

    @property
    def previous_record(self) -> Path:
        """Record of a finished run before it was extended; kept for the user."""
        return self.path / "record.previous.json"

    @property
    def unreadable(self) -> Path:
        """List of unreadable images, in JSON Lines, written by the main process."""
        return self.path / "unreadable-0.jsonl"

    @property
    def unreadable_lists(self) -> list[Path]:
        """All lists of unreadable images; before version 0.2 every process wrote one."""
        return sorted(self.path.glob("unreadable-*.jsonl"))

    @property
    def lock(self) -> Path:
        """File on which a running process holds a lock."""
        return self.path / ".lock"

    def samples(self, process: int) -> Path:
        """Indices and pixel hashes of the samples that a process trained on, in JSON Lines."""
        return self.path / f"samples-{process}.jsonl"

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return os.path.lexists(self.config)

    def state(self) -> tuple[str | None, ...]:
        """Return digests of the settings and the record, to detect whether another command has changed the folder
        since."""
        return tuple(sha256_of(path) if path.is_file() else None for path in (self.config, self.record))


class RunLock:
    """An exclusive lock on a run folder; the kernel releases it when the process ends for any reason.

    It is a record lock, so forked workers do not hold it. On a file system without locks it only logs a warning.

    Raises:
        RequestError: If another process holds the lock; the message names its pid.
    """

    def __init__(self, folder: RunFolder) -> None:
        path = folder.lock
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise RequestError(
                f"{printable(path)} is not a regular file, so the run folder cannot be locked; remove it"
            )
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closing the file would release the lock
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _logger.warning(
                    "%s cannot be locked (%s); make sure that no other command uses it",
                    printable(folder),
                    error.strerror,
                )
                return
            self._file.seek(0)
            holder = self._file.read(20).strip()
            self._file.close()
            pid = holder if holder.isdecimal() else "unknown"
            raise RequestError(
                f"{printable(folder)} is in use by a running process, pid {pid}; wait for it to end, or choose "
                f"another {setting('output_dir')}"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
