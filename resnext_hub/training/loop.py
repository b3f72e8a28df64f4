"""The training loop."""

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from resnext_hub.data.batches import Batch
from resnext_hub.errors import RunError, StoppedRun, one_line, setting
from resnext_hub.facts import UnreadableImage
from resnext_hub.kernels.training_view import require_shared_tensors
from resnext_hub.machine import quiet_compilers
from resnext_hub.processes.launcher import WAIT
from resnext_hub.processes.peers import Peers
from resnext_hub.trackers.fan_out import Trackers
from resnext_hub.training.calibrate import Final, evaluate_and_calibrate
from resnext_hub.training.checkpoint import last_good_checkpoint
from resnext_hub.training.checkpoint_writer import CheckpointWriter
from resnext_hub.training.evaluation import EvaluationStoppedError
from resnext_hub.training.evaluator import Evaluator
from resnext_hub.training.feed import StepInputs, training_batches
from resnext_hub.training.finetune import freeze, set_training
from resnext_hub.training.objective import build_objective
from resnext_hub.training.ood import FittedOod, fit_ood
from resnext_hub.training.optim import set_lr
from resnext_hub.training.plan import Plan
from resnext_hub.training.progress import Progress
from resnext_hub.training.recorder import Recorder
from resnext_hub.training.state import TrainingState
from resnext_hub.training.step import mean_metrics, prepare_objective, take_step
from resnext_hub.training.stop import StopSignal
from resnext_hub.training.unreadable import UnreadableLog, read_unreadable

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of training: the model with its best weights, their results, and facts about the run."""

    model: nn.Module
    final: Final
    """Their results."""
    ood: FittedOod | None
    """Score of out-of-distribution images, if one could be fitted."""
    step: int
    """Step of the best weights."""
    epoch: float
    """Passes over the training split at that step."""
    steps: int
    """Steps of the run."""
    planned_steps: int
    """Steps that it would have had without early stopping."""
    epochs: float
    """Passes over the training split in the whole run."""
    history: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    wall_seconds: float
    resumes: int
    skipped_steps: int
    """Steps that the optimizer skipped because fp16 gradients overflowed."""
    decoders: list[str]
    """Decoders of the training images, in order of use."""
    unreadable: list[UnreadableImage]
    merged_groups: dict[str, int]
    """Number of neighboring groups that were computed as one in training, by layer name."""


def train(
    plan: Plan,
    model: nn.Module,
    accelerator: "Accelerator",
    peers: Peers,
    trackers: Trackers,
    on_checkpoint: Callable[[Path], None] = lambda path: None,
) -> Outcome:
    """Train a model, from the newest checkpoint in its run folder if there is one.

    Args:
        plan: The run; the main process writes `metrics.jsonl` and `checkpoints/` in its folder.
        model: The model in its initial state.
        accelerator: The accelerator of this process.
        peers: The processes of the run.
        trackers: Trackers of the run; only the main process has any.
        on_checkpoint: Called in a thread of the main process with the path of each new checkpoint.

    Raises:
        RunError: If the loss is not finite, or more images are unreadable than allowed.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    config = plan.config
    state = TrainingState(plan, model, accelerator, peers)
    stop = StopSignal(accelerator.num_processes, WAIT)
    inputs = StepInputs(plan, device=accelerator.device, process=accelerator.process_index)
    unreadable = UnreadableLog(plan.folder, peers, config.data.max_bad_fraction)
    evaluator = Evaluator(plan, state, stop, unreadable)
    state.restore()
    recorder = Recorder(plan, state, trackers)
    keep = config.checkpoint.keep_checkpoints
    writer = CheckpointWriter(plan.folder.checkpoints, keep, written=on_checkpoint, failed=stop.request)
    run = _Run(plan, state, stop, unreadable, evaluator, recorder, writer)

    head_only = plan.schedule.head_only(state.step)
    objective = run.prepare_objective()
    optimizer = accelerator.prepare(state.optimizer, device_placement=[False])
    state.keep_start()
    with stop, recorder, writer, contextlib.ExitStack() as stack:
        if not state.evaluated and not run.evaluate_step():
            run.raise_stopped()
        batches = stack.enter_context(contextlib.closing(run.batches()))
        compiling = config.compile
        progress = stack.enter_context(contextlib.closing(run.progress()))
        recorder.timer.restart(state.step)  # exclude the time before the first step from the training speed
        while not state.done:
            with recorder.timer.waiting():
                batch = next(batches)
            if head_only and not plan.schedule.head_only(state.step):
                head_only, objective = False, run.prepare_objective()
                state.keep_start()
            lr = plan.schedule.lr_at(state.step, config.optim.lr or 0.0)
            set_lr(state.optimizer, lr)
            images, targets = inputs(batch, state.step)
            with _compiling() if config.compile else contextlib.nullcontext():
                metrics = take_step(objective, optimizer, images, targets, state.step, plan, accelerator)
            state.advance(metrics[0], optimizer.step_was_skipped)
            unreadable.note("training", plan.splits.train.count, batch.unreadable)
            if compiling:
                recorder.log_compiled()
                compiling = False
            progress.advance()
            recorder.log_samples(batch, images)

            stopping = stop.agreed()
            save_now = stopping or run.checkpoint_due()
            if recorder.log_due() or save_now:
                loss, top1 = run.mean_metrics(metrics)
                if recorder.log_due():
                    speed, wait = recorder.log_step(lr, loss, top1)
                    left = run.seconds_left(speed)
                    progress.show(loss=loss, top1=top1, lr=lr, speed=speed, wait=wait, seconds_left=left)
            if not state.evaluated:
                stopping = stopping or not run.evaluate_step()
                save_now = save_now or state.stopped_early
            if save_now or stopping:
                run.save()
            if stopping:
                run.raise_stopped()
        return run.finish()


@dataclass(frozen=True)
class _Run:
    """The parts of a run, and the operations that involve several of them."""

    plan: Plan
    state: TrainingState
    stop: StopSignal
    unreadable: UnreadableLog
    evaluator: Evaluator
    recorder: Recorder
    writer: CheckpointWriter

    def batches(self) -> Generator[Batch, None, None]:
        """Return this process's part of every remaining step."""
        state = self.state
        return training_batches(
            self.plan,
            start=state.step,
            process=state.accelerator.process_index,
            processes=state.accelerator.num_processes,
            pin_memory=state.accelerator.device.type == "cuda",
        )

    def prepare_objective(self) -> nn.Module:
        """Return the objective over a new training view, ready to train what is trained at the current step."""
        plan, state = self.plan, self.state
        freeze(state.model, plan.config.finetune.frozen(state.model, plan.schedule.head_only(state.step)))
        view = state.build_view()
        if plan.config.compile:
            view.compile(dynamic=False)
        built = build_objective(plan, view, state.accelerator.device)
        objective = prepare_objective(built, plan, state.accelerator)
        require_shared_tensors(view, state.model)
        objective.train()
        set_training(view)
        return objective

    def progress(self) -> Progress:
        """Return the progress of the run from the current step on; the main process shows it."""
        count = self.plan.splits.train.count
        return Progress(
            steps=self.plan.schedule.steps,
            step=self.state.step,
            per_epoch=count / self.plan.config.batch_size,
            visible=self.recorder.is_main,
            right="all labels correct" if self.plan.splits.is_multi_label else "accuracy",
        )

    def seconds_left(self, speed: float) -> float:
        """Return the estimated seconds to the end of the run, at a number of images per second."""
        schedule, step = self.plan.schedule, self.state.step
        evaluations = sum(at > step for at in schedule.evaluations) + 1  # the best weights are evaluated once more
        training = (schedule.steps - step) * self.plan.config.batch_size / max(speed, 1e-9)
        return training + evaluations * self.recorder.timer.evaluation

    def mean_metrics(self, metrics: torch.Tensor) -> tuple[float, float]:
        """Return the mean loss and the top-1 accuracy of the global batch.

        Raises:
            RunError: If the loss of this or an earlier step is not finite.
        """
        loss, top1 = mean_metrics(metrics, self.plan, self.state.accelerator)
        if not math.isfinite(loss):
            self._raise_not_finite(f"loss is {loss}", self.state.first_bad_step())
        return loss, top1

    def evaluate_step(self) -> bool:
        """Evaluate, and keep the weights if they are the best so far.

        Returns:
            Whether the evaluation completed; False if a signal interrupted it.
        """
        self.wait_saved()  # evaluation forks workers, which must not inherit what another thread is writing
        self.state.synchronize_buffers()  # before weights are averaged
        try:
            with self.recorder.timer.evaluating():
                evaluation = self.evaluator(self.state.published)
        except EvaluationStoppedError:
            self.stop.stopping()
            return False
        if not math.isfinite(evaluation.loss):
            self._raise_not_finite(f"loss on the evaluation split is {evaluation.loss}", self.state.step)
        self.recorder.log_evaluation(evaluation, self.state.keep_best(evaluation))
        self.state.evaluated = True
        return True

    def checkpoint_due(self) -> bool:
        """Return whether a checkpoint is due; minutes are checked on log steps, by the clock of the main process."""
        every, state = self.plan.config.checkpoint, self.state
        if state.done:
            return True
        if every.steps is not None:
            return state.step % every.steps == 0
        if not self.recorder.log_due():
            return False
        due = self.recorder.timer.since_checkpoint >= (every.seconds or math.inf)
        if state.accelerator.num_processes == 1:
            return due
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor([due], device=state.accelerator.device, dtype=torch.uint8)).item())

    def save(self) -> None:
        """Take a snapshot, and write it as a checkpoint in a thread of the main process.

        Raises:
            RunError: If the previous checkpoint could not be written, or the weights are not finite.
        """
        state, timer = self.state, self.recorder.timer
        if not state.weights_are_finite():
            self._raise_not_finite("weights are not finite", state.step)
        with timer.apart():
            self.unreadable.collect()
            state.peers.from_main(lambda: self.writer.write(lambda: state.snapshot(timer.wall_seconds)))
        timer.checkpointed()

    def wait_saved(self) -> None:
        """Wait, in every process, until the last checkpoint is complete.

        Raises:
            RunError: If it could not be written.
        """
        self.state.peers.from_main(self.writer.wait)

    def finish(self) -> Outcome:
        """Load the best weights, evaluate and calibrate them, and return the outcome of the run."""
        state = self.state
        self.wait_saved()
        if state.stopped_early:
            _logger.info(
                "stopped early at step %d of %d: %d evaluations in a row without an improvement",
                state.step,
                self.plan.schedule.steps,
                state.stale,
            )
        if state.best is None:  # the only evaluation was interrupted at the last step, and again after a resume
            self.raise_stopped()
        state.model.load_state_dict(state.best.tensors)
        try:
            final = evaluate_and_calibrate(self.plan, state.model, self.evaluator, state.peers)
        except EvaluationStoppedError:
            self.stop.stopping()
            self.raise_stopped()
        ood = fit_ood(self.plan, state.model, state.accelerator)
        if final.evaluation.correct != state.best.correct:
            _logger.warning(
                "the best weights classified %d images correctly at step %d, but %d now; the current count is "
                "recorded. Results on this device are not deterministic; for reproducible results, use --deterministic",
                state.best.correct,
                state.best.step,
                final.evaluation.correct,
            )
        self.unreadable.collect()
        return Outcome(
            model=state.model.eval(),
            final=final,
            ood=ood,
            step=state.best.step,
            epoch=state.best.epoch,
            steps=state.step,
            planned_steps=self.plan.schedule.steps,
            epochs=state.epoch,
            history=self.recorder.history(),
            wall_seconds=self.recorder.timer.wall_seconds,
            resumes=state.resumes,
            skipped_steps=state.skipped_steps,
            decoders=state.decoders,
            unreadable=read_unreadable(self.plan.folder),
            merged_groups=state.merged_groups or {},
        )

    def raise_stopped(self) -> NoReturn:
        """Raise StoppedRun after a signal, once the checkpoint of this step is complete."""
        self.wait_saved()
        raise StoppedRun(
            f"stopped by {self.stop.number.name}; step {self.state.step} of {self.plan.schedule.steps} is saved: rerun "
            "the same command to resume",
            self.stop.number,
        )

    def _raise_not_finite(self, what: str, step: int) -> NoReturn:
        self.wait_saved()
        good = self.state.peers.from_main(lambda: last_good_checkpoint(self.plan.folder.checkpoints))
        raise RunError(
            f"the {what} at step {step}; {good}; try a lower {setting('lr')}, or {setting('clip_grad', 1)}",
            everywhere=True,
        )


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Turn compiler errors into a one-line RunError."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        with quiet_compilers():
            yield
    except TorchDynamoException as error:
        raise RunError(
            f"torch.compile failed for this model ({one_line(error)[:200]}); rerun without {setting('compile', True)}"
        ) from error
