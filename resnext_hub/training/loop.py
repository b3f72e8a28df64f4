"""The training loop, in the order of events.

The state of a run is the weights, their moving average, the optimizer, the best weights so far and the step; sample
order, learning rate and random numbers are functions of the step. So a resume starts at a step and needs nothing else.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from resnext_hub.data.dataset import Splits
from resnext_hub.data.loaders import (
    PICTURE_MODES,
    Batch,
    EvaluationSamples,
    StepSampler,
    TrainingSamples,
    build_train_loader,
    read_batches,
)
from resnext_hub.data.transforms import build_eval_transform, build_train_transform, draw_mix, mix_pairs
from resnext_hub.errors import RunError, StoppedRun, one_line
from resnext_hub.machine import WAIT
from resnext_hub.training.checkpoint import latest_checkpoint, save_checkpoint
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.evaluate import Evaluation, EvaluationStoppedError, evaluate
from resnext_hub.training.metrics import LineLog, UnreadableLog, read_lines, read_unreadable
from resnext_hub.training.optim import build_optimizer, lr_at, optimizer_state, restore_optimizer, set_lr
from resnext_hub.training.stop import StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)

_NEVER = 2**62
"""A step that no run reaches."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What happens at which step, counted from 1."""

    steps: int
    warmup_steps: int
    evaluations: frozenset[int]


def plan_schedule(config: TrainConfig, count: int) -> Schedule:
    """Give the schedule of a run over `count` training samples.

    A run has ceil(epochs * count / batch) steps, and an epoch is evaluated at the step that completes it.
    """
    per_epoch = count / config.batch_size
    steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    evaluations = {steps}
    epoch = config.eval_every
    while math.ceil(epoch * per_epoch) < steps:
        evaluations.add(math.ceil(epoch * per_epoch))
        epoch += config.eval_every
    warmup = min(round(config.optim.warmup_epochs * per_epoch), steps // 2)
    return Schedule(steps=steps, warmup_steps=warmup, evaluations=frozenset(evaluations))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training gives: the network with its best weights, and how they do."""

    network: nn.Module
    evaluation: Evaluation
    step: int
    """Step of the best weights."""
    steps: int
    history: list[dict[str, Any]]
    wall_seconds: float
    resumes: int
    skipped_steps: int
    """Steps whose gradients overflowed in fp16, so that the weights were left as they were."""
    unreadable: list[dict[str, str]]
    """Pictures that could not be read: split, picture, reason."""


class Objective(nn.Module):
    """The loss as a module, so that what wraps it (autocast, data parallelism) leaves the network itself untouched."""

    def __init__(self, network: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Map pictures `(N, C, H, W)` and labels `(N,)`, or targets `(N, classes)`, to the mean cross entropy."""
        return F.cross_entropy(self.network(images).float(), labels, label_smoothing=self.label_smoothing)


@dataclass(kw_only=True)
class _Best:
    """The best weights so far: most samples right, then the lower loss."""

    step: int
    correct: int
    loss: float
    tensors: dict[str, torch.Tensor]

    def beaten_by(self, evaluation: Evaluation) -> bool:
        return (evaluation.correct, -evaluation.loss) > (self.correct, -self.loss)


def train(
    config: TrainConfig,
    splits: Splits,
    network: nn.Module,
    data_config: dict[str, Any],
    folder: Path,
    accelerator: "Accelerator",
    precision: str,
) -> Outcome:
    """Train a network from the newest checkpoint of a run folder, or from the start.

    Args:
        config: The resolved configuration.
        splits: What to train and evaluate on.
        network: The network, as it is before the first step.
        data_config: Input size, crop, interpolation, mean and std, in timm's keys.
        folder: The run folder; the main process writes `metrics.jsonl` and `checkpoints/` in it.
        accelerator: Accelerate's view of devices and processes.
        precision: Resolved mixed precision, for the facts of a checkpoint.

    Raises:
        RunError: If the loss is not finite, or more pictures cannot be read than may be.
        StoppedRun: If SIGTERM asked for it; the state was saved.
    """
    run = _Run(config, splits, network, data_config, folder, accelerator, precision)
    run.restore()
    objective, optimizer = accelerator.prepare(Objective(run.network, config.label_smoothing), run.optimizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.stop)
        run.open_logs(stack)
        if not run.evaluated and not run.evaluate_step():
            run.say_stopped()
        batches = stack.enter_context(contextlib.closing(read_batches(run.build_loader())))
        network.train()
        bar = stack.enter_context(
            tqdm(total=run.schedule.steps, initial=run.step, unit="step", disable=None if run.metrics else True)
        )
        while run.step < run.schedule.steps:
            with run.timer.waiting():
                batch = next(batches)
            lr = lr_at(run.step, run.schedule.steps, run.schedule.warmup_steps, config.optim.lr or 0.0)
            set_lr(run.optimizer, lr)
            _seed_step(config.seed, run.step, accelerator.process_index)
            images, targets = run.inputs(batch)
            loss = _optimizer_step(objective, optimizer, images, targets, config, accelerator)
            run.stepped(loss, optimizer.step_was_skipped)
            bar.update()
            run.log_samples(batch, images)
            run.unreadable.note("training", splits.train, batch.unreadable)

            stopping = run.stop.agreed()
            save_now = stopping or run.checkpoint_due()
            if run.log_due() or save_now:
                value = run.mean_loss(loss)
                if run.log_due():
                    bar.set_postfix(run.log_step(lr, value))
            if run.step in run.schedule.evaluations:
                stopping = stopping or not run.evaluate_step()
            if save_now or stopping:
                run.save()
            if stopping:
                run.say_stopped()
        return run.finish()


class _Run:
    """What the steps of the loop work on; the main process alone writes."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        network: nn.Module,
        data_config: dict[str, Any],
        folder: Path,
        accelerator: "Accelerator",
        precision: str,
    ) -> None:
        self.config, self.splits, self.folder, self.accelerator = config, splits, folder, accelerator
        self.data_config = data_config
        self.mode = PICTURE_MODES[data_config["input_size"][0]]
        self.schedule = plan_schedule(config, len(splits.train))
        # the unwrapped network: what evaluates, and what is saved
        self.network = network.to(accelerator.device).to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.network, decay=config.ema, use_warmup=True) if config.ema else None
        self.optimizer = build_optimizer(self.network, config.optim)
        self.stop = StopSignal(accelerator.num_processes, WAIT)
        self.eval_samples = EvaluationSamples(splits.eval, build_eval_transform(data_config), self.mode)
        self.how = {
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": precision,
            "device": accelerator.device.type,
        }
        self.step = self.resumes = self.skipped_steps = 0
        self.evaluated = True
        """Whether the evaluation that is due at this step, if any, was done."""
        self.first_bad_step = torch.tensor(_NEVER, device=accelerator.device)
        self.best: _Best | None = None
        self.timer = _Timer(0.0, 0)
        self.unreadable = UnreadableLog(folder, accelerator.process_index, config.data.max_bad_fraction)
        self.metrics: LineLog | None = None
        self.samples: LineLog | None = None

    @property
    def published(self) -> nn.Module:
        """What is evaluated and kept: the moving average where there is one."""
        return self.network if self.ema is None else self.ema.module

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def workers(self) -> int:
        assert self.config.loader.workers is not None
        return self.config.loader.workers

    @property
    def epoch(self) -> float:
        return round(self.step * self.config.batch_size / len(self.splits.train), 4)

    def restore(self) -> None:
        """Load the newest checkpoint, if any. The main process chooses, so that all load the same one."""
        from accelerate.utils import broadcast_object_list

        chosen = [latest_checkpoint(self.checkpoints) if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(chosen)
        checkpoint = chosen[0]
        if checkpoint is None:
            return
        facts = checkpoint.facts
        self.network.load_state_dict(checkpoint.tensors("model"))
        restore_optimizer(self.optimizer, checkpoint.tensors("optimizer"), facts["optimizer"])
        if self.accelerator.scaler is not None and facts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.tensors("ema"))
        if facts["best"] is not None:
            same = facts["best"]["step"] == checkpoint.step
            name = "best" if not same else "model" if self.ema is None else "ema"
            self.best = _Best(**facts["best"], tensors=checkpoint.tensors(name))
        self.step, self.resumes = checkpoint.step, facts["resumes"] + 1
        self.skipped_steps = facts["skipped_steps"]
        self.evaluated = facts["evaluated"]
        self.timer = _Timer(facts["wall_seconds"], self.step)
        _logger.info("going on from %s", checkpoint.path.name)
        for name, before in facts["how"].items():
            if self.how[name] != before:
                _logger.warning(
                    "%s: %s before, %s now; data and schedule stay the same, the weights can differ in their last bits",
                    name,
                    before,
                    self.how[name],
                )

    def open_logs(self, stack: contextlib.ExitStack) -> None:
        process = self.accelerator.process_index
        if self.accelerator.is_main_process:
            self.metrics = stack.enter_context(LineLog(self.folder / "metrics.jsonl", self.step, self.evaluated))
        if self.config.log_samples:
            self.samples = stack.enter_context(LineLog(self.folder / f"samples-{process}.jsonl", self.step))

    def build_loader(self) -> DataLoader[Batch]:
        transform = build_train_transform(self.config.transform, self.data_config)
        sampler = StepSampler(
            len(self.splits.train),
            self.config.batch_size,
            self.config.seed,
            self.step,
            self.schedule.steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return build_train_loader(
            TrainingSamples(self.splits.train, transform, self.config.seed, self.mode),
            sampler,
            self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Give pictures `(N, C, H, W)` and labels `(N,)`, or mixed targets `(N, classes)`, on the device."""
        images = batch.images.to(self.accelerator.device, non_blocking=True)
        labels = batch.labels.to(self.accelerator.device, non_blocking=True)
        if self.config.transform.mixes:
            first = self.accelerator.process_index * len(labels) // 2
            pairs = range(first, first + len(labels) // 2)
            mix = draw_mix(
                self.config.transform, self.config.seed, self.step, pairs, (images.shape[2], images.shape[3])
            )
            images, labels = mix_pairs(images, labels, mix, len(self.splits.label_names))
        return images.contiguous(memory_format=torch.channels_last), labels

    def stepped(self, loss: torch.Tensor, skipped: bool) -> None:
        """Count a step that was taken; nothing here waits for the device."""
        self.step += 1
        self.skipped_steps += skipped
        self.evaluated = self.step not in self.schedule.evaluations
        self.first_bad_step.clamp_(max=torch.where(loss.isfinite(), _NEVER, self.step))
        if self.ema is not None:
            self.ema.update(self.network, step=self.step)

    def log_samples(self, batch: Batch, images: torch.Tensor) -> None:
        if self.samples:
            pixels = [hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()[:16] for image in images]
            self.samples.write(step=self.step, indices=batch.indices.tolist(), pixels=pixels)

    def mean_loss(self, loss: torch.Tensor) -> float:
        """Give the loss over the global batch.

        Raises:
            RunError: If the loss of this or an earlier step is not finite.
        """
        mean = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean):
            self._stop_not_finite(f"loss is {mean}", int(self.accelerator.gather(self.first_bad_step).min()))
        return mean

    def log_due(self) -> bool:
        return self.step % self.config.log_every == 0 or self.step == self.schedule.steps

    def log_step(self, lr: float, loss: float) -> dict[str, str]:
        speed, wait = self.timer.lap(self.step, self.config.batch_size)
        if self.metrics:
            facts = {"lr": lr, "loss": loss, "images_per_second": speed, "data_wait": wait}
            self.metrics.write(step=self.step, epoch=self.epoch, **facts)
        return {"loss": f"{loss:.3f}", "images/s": f"{speed:.0f}", "data_wait": f"{wait:.0%}"}

    def evaluate(self, network: nn.Module) -> Evaluation:
        self._broadcast_buffers()
        evaluation = evaluate(
            network,
            self.eval_samples,
            batch_size=self.config.eval_batch_size,
            device=self.accelerator.device,
            workers=self.workers,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            sum_over_processes=self._sum,
            stop_requested=lambda: self.stop.requested,
        )
        self.unreadable.note("evaluation", self.splits.eval, evaluation.unreadable)
        return evaluation

    def evaluate_step(self) -> bool:
        """Evaluate, and keep the weights if they are the best so far; say if it was done, not stopped by SIGTERM."""
        try:
            with self.timer.apart():
                evaluation = self.evaluate(self.published)
        except EvaluationStoppedError:
            return False
        if not math.isfinite(evaluation.loss):
            self._stop_not_finite(f"loss on the evaluation split is {evaluation.loss}", self.step)
        facts: dict[str, Any] = {
            "eval_loss": evaluation.loss,
            "eval_top1": evaluation.top1,
            "eval_correct": evaluation.correct,
            "eval_count": evaluation.count,
        }
        if self.metrics:
            self.metrics.write(step=self.step, epoch=self.epoch, **facts)
        _logger.info(
            "epoch %g, step %d of %d: %d of %d right (%.2f %%), loss %.4f",
            self.epoch,
            self.step,
            self.schedule.steps,
            evaluation.correct,
            evaluation.count,
            100 * evaluation.top1,
            evaluation.loss,
        )
        if self.best is None or self.best.beaten_by(evaluation):
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.published.state_dict().items()}
            self.best = _Best(step=self.step, correct=evaluation.correct, loss=evaluation.loss, tensors=tensors)
        self.evaluated = True
        return True

    def checkpoint_due(self) -> bool:
        """Say whether to save now; for minutes, the main process's clock decides, asked on log steps."""
        every = self.config.checkpoint
        if self.step == self.schedule.steps:
            return True
        if every.steps is not None:
            return self.step % every.steps == 0
        if not self.log_due():
            return False
        due = self.timer.since_checkpoint >= (every.seconds or math.inf)
        if self.accelerator.num_processes == 1:
            return due
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor([due], device=self.accelerator.device, dtype=torch.uint8)).item())

    def save(self) -> None:
        # the loss of a step is finite still when that step has spoilt the weights: no such state is worth keeping
        if not torch.nn.utils.get_total_norm(self.network.parameters()).isfinite():
            self._stop_not_finite("weights are not finite", self.step)
        with self.timer.apart():
            if self.accelerator.is_main_process:
                self._save()
        self.timer.checkpointed()

    def _save(self) -> None:
        optimizer_tensors, optimizer_facts = optimizer_state(self.optimizer)
        tensors = {"model": self.network.state_dict(), "optimizer": optimizer_tensors}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        scaler, best = self.accelerator.scaler, self.best
        if best is not None and best.step != self.step:
            tensors["best"] = best.tensors
        facts = {
            "optimizer": optimizer_facts,
            "scaler": None if scaler is None else scaler.state_dict(),
            "best": None if best is None else {"step": best.step, "correct": best.correct, "loss": best.loss},
            "how": self.how,
            "wall_seconds": self.timer.wall_seconds,
            "resumes": self.resumes,
            "skipped_steps": self.skipped_steps,
            "evaluated": self.evaluated,
        }
        try:
            save_checkpoint(self.checkpoints, self.step, tensors, facts, self.config.checkpoint.keep_checkpoints)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the checkpoint of step {self.step} could not be written ({one_line(error)}); {self._last_good()}"
            ) from error

    def _stop_not_finite(self, what: str, step: int) -> NoReturn:
        raise RunError(
            f"the {what} at step {step}, so the run stops; {self._last_good()}; try a lower --lr, or --clip-grad 1",
            everywhere=True,
        )

    def say_stopped(self) -> NoReturn:
        raise StoppedRun(
            f"stopped by SIGTERM after step {self.step} of {self.schedule.steps}, which is saved; the same command "
            "goes on from there"
        )

    def finish(self) -> Outcome:
        """Evaluate the best weights once more, as they will be published."""
        if self.best is None:  # an evaluation was stopped at the very end, and again when the run went on
            self.say_stopped()
        self.network.load_state_dict(self.best.tensors)
        try:
            evaluation = self.evaluate(self.network)
        except EvaluationStoppedError:
            self.say_stopped()
        if evaluation.correct != self.best.correct:  # without deterministic algorithms, an accelerator may do so
            _logger.warning(
                "the best weights had %d right at step %d and have %d now, which is what is recorded: this device does "
                "not compute the same twice (--deterministic)",
                self.best.correct,
                self.best.step,
                evaluation.correct,
            )
        return Outcome(
            network=self.network.eval(),
            evaluation=evaluation,
            step=self.best.step,
            steps=self.schedule.steps,
            history=read_lines(self.folder / "metrics.jsonl"),
            wall_seconds=self.timer.wall_seconds,
            resumes=self.resumes,
            skipped_steps=self.skipped_steps,
            unreadable=read_unreadable(self.folder),
        )

    def _last_good(self) -> str:
        checkpoint = latest_checkpoint(self.checkpoints) if self.accelerator.is_main_process else None
        return f"the last good checkpoint is {checkpoint.path.name}" if checkpoint else "there is no checkpoint yet"

    def _broadcast_buffers(self) -> None:
        """Give every process the main one's batch norm statistics: each saw its own part of the batches."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for network in [self.network] if self.ema is None else [self.network, self.ema.module]:
                for buffer in network.buffers():
                    buffer.copy_(broadcast(buffer.clone()))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return values
        total: torch.Tensor = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return total.cpu()


def _optimizer_step(
    objective: nn.Module,
    optimizer: Any,
    images: torch.Tensor,
    targets: torch.Tensor,
    config: TrainConfig,
    accelerator: "Accelerator",
) -> torch.Tensor:
    """Take one step on this process's part of the global batch; give the mean loss over it, a scalar."""
    optimizer.zero_grad()
    size = len(images)
    micro = config.micro_batch_size or size
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, size, micro):
        part = slice(start, min(start + micro, size))
        last = part.stop == size
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            # by its true size, so that a shorter last part counts for what it is
            loss = objective(images[part], targets[part]) * ((part.stop - start) / size)
            accelerator.backward(loss)
        total += loss.detach()
    if config.optim.clip_grad is not None:
        accelerator.clip_grad_norm_(objective.parameters(), config.optim.clip_grad)
    optimizer.step()
    return total


def _seed_step(seed: int, step: int, process: int) -> None:
    """Seed dropout and stochastic depth, so that nothing of the generators needs saving."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))


class _Timer:
    """Wall time of the run, training speed between log lines, and the part of it spent waiting for data."""

    def __init__(self, wall_before: float, step: int) -> None:
        now = time.monotonic()
        self._start = now - wall_before
        self._checkpoint = self._lap = now
        self._step = step
        self._waited = self._apart = 0.0

    @property
    def wall_seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)

    @property
    def since_checkpoint(self) -> float:
        return time.monotonic() - self._checkpoint

    def checkpointed(self) -> None:
        self._checkpoint = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave evaluation and saving out of the training speed."""
        begin = time.monotonic()
        yield
        self._apart += time.monotonic() - begin

    def lap(self, step: int, batch_size: int) -> tuple[float, float]:
        """Give images per second, and the fraction of the time spent waiting for data, since the last lap."""
        now = time.monotonic()
        spent = max(now - self._lap - self._apart, 1e-9)
        speed, wait = (step - self._step) * batch_size / spent, self._waited / spent
        self._lap, self._step, self._waited, self._apart = now, step, 0.0, 0.0
        return round(speed, 2), round(wait, 4)
