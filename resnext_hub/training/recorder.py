"""Records of a run in progress: metrics.jsonl, the samples of each step, log lines and timing."""

import hashlib
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from resnext_hub.data.batches import Batch
from resnext_hub.processes.peers import Peers
from resnext_hub.text import listing, printable
from resnext_hub.trackers.fan_out import Trackers
from resnext_hub.training.balance import is_imbalanced
from resnext_hub.training.evaluation import AnyEvaluation
from resnext_hub.training.metrics import METRICS, LineLog, read_lines
from resnext_hub.training.multi_label import MultiLabelEvaluation
from resnext_hub.training.plan import Plan
from resnext_hub.training.progress import clock
from resnext_hub.training.state import TrainingState
from resnext_hub.training.timer import Timer

_logger = logging.getLogger(__name__)


MOST_CLASSES = 100
"""Number of classes up to which metrics.jsonl has the recall of each."""


def summary_of(evaluation: AnyEvaluation, macro: bool = False) -> str:
    """Return the main results of an evaluation in words.

    Args:
        evaluation: The evaluation.
        macro: Whether to state the macro recall of images with one label each.
    """
    counts = f"{100 * evaluation.top1:.2f} % ({evaluation.correct}/{evaluation.count})"
    if isinstance(evaluation, MultiLabelEvaluation):
        return (
            f"mAP {100 * evaluation.mean_average_precision:.2f} %, macro-F1 {evaluation.macro_f1:.4f}, all labels "
            f"correct {counts}"
        )
    return f"accuracy {counts}" + (f", macro recall {100 * evaluation.macro_recall:.2f} %" if macro else "")


class Recorder:
    """Records of one process; only the main process writes metrics.

    Args:
        plan: The run.
        state: Its state, restored. Lines of later steps are removed, because those steps will be repeated.
        trackers: Trackers that get the metrics as well.
    """

    def __init__(self, plan: Plan, state: TrainingState, trackers: Trackers) -> None:
        self.timer = Timer(state.wall_seconds, state.step)
        self._plan, self._state, self._trackers = plan, state, trackers
        self._macro = is_imbalanced(plan.splits.train) or str(plan.config.balance.best_by).startswith("macro")
        self._metrics: LineLog | None = None
        self._samples: LineLog | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes metrics and shows progress."""
        return bool(self._state.accelerator.is_main_process)

    def __enter__(self) -> "Recorder":
        state, folder = self._state, self._plan.folder
        if self.is_main:
            self._metrics = LineLog(folder.metrics, state.step, state.evaluated, METRICS)
        state.peers.from_main(lambda: self._trackers.start(self.history(), resumed=state.step > 0))
        if self._plan.config.log_samples:
            folder.path.mkdir(parents=True, exist_ok=True)  # it exists only on the main process's host
            self._samples = LineLog(folder.samples(state.accelerator.process_index), state.step)
            _log_where(folder.samples(state.accelerator.process_index), state.peers)
        return self

    def __exit__(self, *_: object) -> None:
        for log in (self._metrics, self._samples):
            if log is not None:
                log.close()

    def log_due(self) -> bool:
        """Return whether to log this step."""
        step, steps = self._state.step, self._plan.schedule.steps
        return step % self._plan.config.log_every == 0 or step == steps

    def log_step(self, lr: float, loss: float, top1: float) -> tuple[float, float]:
        """Write the metrics of a step; return the images per second, and the fraction of time spent waiting for data.

        Loss and accuracy are those of this step's batch, as it was augmented.
        """
        speed, wait = self.timer.lap(self._state.step, self._plan.config.batch_size)
        self._write({"lr": lr, "loss": loss, "top1": top1, "images_per_second": speed, "data_wait": wait})
        return speed, wait

    def log_samples(self, batch: Batch, images: torch.Tensor) -> None:
        """Write the indices of a step's samples and hashes of their pixels, if `log_samples` is set."""
        if self._samples:
            pixels = [hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()[:16] for image in images]
            self._samples.write(step=self._state.step, indices=batch.indices.tolist(), pixels=pixels)

    def log_evaluation(self, evaluation: AnyEvaluation, is_best: bool) -> None:
        """Write and log the metrics of an evaluation.

        Args:
            evaluation: The evaluation.
            is_best: Whether its weights are the best so far.
        """
        facts: dict[str, Any] = {
            "eval_loss": evaluation.loss,
            "eval_top1": evaluation.top1,
            "eval_correct": evaluation.correct,
            "eval_count": evaluation.count,
            "eval_macro_recall": evaluation.macro_recall,
            "eval_macro_f1": evaluation.macro_f1,
        }
        classes = len(self._plan.splits.label_names)
        if classes <= MOST_CLASSES:
            recalls = evaluation.recall_by_class(classes)
            facts["eval_recall"] = [None if recall is None else round(recall, 6) for recall in recalls]
        if isinstance(evaluation, MultiLabelEvaluation):
            facts["eval_map"] = evaluation.mean_average_precision
        self._write(facts)
        _logger.info(
            "epoch %g, step %d of %d: %s, loss %.4f%s (%s)",
            self._state.epoch,
            self._state.step,
            self._plan.schedule.steps,
            summary_of(evaluation, self._macro),
            evaluation.loss,
            ", best so far" if is_best else "",
            clock(self.timer.wall_seconds),
        )

    def log_compiled(self) -> None:
        """Log the duration of the first step, which compiles the model, and exclude it from the training speed."""
        _logger.info("compiled the model; the first step took %.0f s", self.timer.restart(self._state.step))

    def _write(self, facts: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, then send it to the trackers."""
        if self._metrics:
            line = {"step": self._state.step, "epoch": self._state.epoch, **facts}
            self._metrics.write(**line)
            with self.timer.apart():
                self._trackers.log(line)

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return read_lines(self._plan.folder.metrics, *METRICS)


def _log_where(samples: Path, peers: Peers) -> None:
    """Log where the processes of other hosts than the main process's log their samples."""
    (main, _), *others = peers.gather((platform.node(), str(samples.absolute())))
    elsewhere = [f"{printable(host)}:{printable(path)}" for host, path in others if host != main]
    if elsewhere:
        _logger.info("sample logs of the processes on other hosts: %s", listing(elsewhere, 8))
