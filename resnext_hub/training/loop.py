"""The training loop, in the order of events.

The state of a run is the weights, the optimizer, the best weights so far and the step; sample order, learning rate and
random numbers are functions of the step. So a resume starts at a step and needs nothing else.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from resnext_hub.data.dataset import Splits
from resnext_hub.data.loaders import (
    PICTURE_MODES,
    Batch,
    EvaluationSamples,
    StepSampler,
    TrainingSamples,
    build_train_loader,
)
from resnext_hub.data.transforms import build_eval_transform, build_train_transform
from resnext_hub.errors import RunError
from resnext_hub.training.checkpoint import latest_checkpoint, save_checkpoint
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.evaluate import Evaluation, evaluate
from resnext_hub.training.metrics import LineLog, read_lines
from resnext_hub.training.optim import build_optimizer, lr_at, optimizer_state, restore_optimizer, set_lr

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)


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


class Objective(nn.Module):
    """The loss as a module, so that what wraps it (autocast, data parallelism) leaves the network itself untouched."""

    def __init__(self, network: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Map pictures `(N, C, H, W)` and labels `(N,)` to the mean cross entropy, a scalar."""
        return F.cross_entropy(self.network(images).float(), labels, label_smoothing=self.label_smoothing)


@dataclass(kw_only=True)
class _Best:
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
        RunError: If the loss is not finite, or a picture cannot be read.
    """
    device = accelerator.device
    process, processes = accelerator.process_index, accelerator.num_processes
    assert config.loader.workers is not None
    workers = config.loader.workers
    schedule = plan_schedule(config, len(splits.train))
    mode = PICTURE_MODES[data_config["input_size"][0]]

    # what is computed
    network = network.to(device).to(memory_format=torch.channels_last)
    raw_optimizer = build_optimizer(network, config.optim)
    how = {
        "processes": processes,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "device": device.type,
    }
    step, best, wall_before, resumes = _restore(folder, network, raw_optimizer, accelerator, how)
    if step > schedule.steps:
        raise RunError(f"the run is at step {step} already, beyond the {schedule.steps} steps asked for")
    objective, optimizer = accelerator.prepare(Objective(network, config.label_smoothing), raw_optimizer)

    # what it is computed on
    loader = build_train_loader(
        TrainingSamples(splits.train, build_train_transform(config.transform, data_config), config.seed, mode),
        StepSampler(len(splits.train), config.batch_size, config.seed, step, schedule.steps, process, processes),
        workers,
        pin_memory=device.type == "cuda",
    )
    eval_samples = EvaluationSamples(splits.eval, build_eval_transform(data_config), mode)

    # where it is written
    metrics = LineLog(folder / "metrics.jsonl", step) if accelerator.is_main_process else None
    samples = LineLog(folder / f"samples-{process}.jsonl", step) if config.log_samples else None
    timer = _Timer(wall_before, step)

    def epoch_at(step: int) -> float:
        return round(step * config.batch_size / len(splits.train), 4)

    def run_evaluation() -> Evaluation:
        _broadcast_buffers(network, accelerator)
        return evaluate(
            network,
            eval_samples,
            batch_size=config.eval_batch_size,
            device=device,
            workers=workers,
            process=process,
            processes=processes,
            sum_over_processes=lambda values: _sum(values, accelerator),
        )

    def save(step: int) -> None:
        if accelerator.is_main_process:
            assert best is not None or step < min(schedule.evaluations)
            _save(
                folder,
                step,
                network,
                raw_optimizer,
                best,
                accelerator,
                how,
                timer.wall_seconds,
                resumes,
                config,
            )
        timer.checkpointed()

    network.train()
    batches = iter(loader)
    progress = tqdm(total=schedule.steps, initial=step, unit="step", disable=None if metrics else True)
    while step < schedule.steps:
        with timer.waiting():
            batch = next(batches)
        lr = lr_at(step, schedule.steps, schedule.warmup_steps, config.optim.lr or 0.0)
        set_lr(raw_optimizer, lr)
        _seed_step(config.seed, step, process)
        loss = _optimizer_step(objective, optimizer, batch, config, accelerator)
        step += 1
        progress.update()
        if samples:
            samples.write(step=step, indices=batch.indices.tolist(), pixels=_hash(batch.images))

        save_now = step == schedule.steps or _checkpoint_due(step, config, timer, accelerator)
        log_now = step == schedule.steps or step % config.log_every == 0
        if log_now or save_now:
            value = float(accelerator.reduce(loss, "mean"))
            _require_finite(value, step, folder)
        if log_now:
            speed, wait = timer.lap(step, config.batch_size)
            progress.set_postfix(loss=f"{value:.3f}", images_per_second=f"{speed:.0f}", data_wait=f"{wait:.0%}")
            if metrics:
                metrics.write(
                    step=step,
                    epoch=epoch_at(step),
                    lr=lr,
                    loss=value,
                    images_per_second=speed,
                    data_wait=wait,
                )

        if step in schedule.evaluations:
            with timer.apart():
                evaluation = run_evaluation()
            _require_finite(evaluation.loss, step, folder)
            if best is None or best.beaten_by(evaluation):
                best = _Best(
                    step=step,
                    correct=evaluation.correct,
                    loss=evaluation.loss,
                    tensors=_to_cpu(network.state_dict()),
                )
            if metrics:
                metrics.write(
                    step=step,
                    epoch=epoch_at(step),
                    eval_loss=evaluation.loss,
                    eval_top1=evaluation.top1,
                    eval_correct=evaluation.correct,
                    eval_count=evaluation.count,
                )
            _logger.info(
                "epoch %g, step %d of %d: %d of %d right (%.2f %%), loss %.4f",
                epoch_at(step),
                step,
                schedule.steps,
                evaluation.correct,
                evaluation.count,
                100 * evaluation.top1,
                evaluation.loss,
            )

        if save_now:
            with timer.apart():
                save(step)
    progress.close()
    for log in (metrics, samples):
        if log:
            log.close()

    assert best is not None
    network.load_state_dict(best.tensors)
    evaluation = run_evaluation()
    if evaluation.correct != best.correct:
        raise RunError(
            f"the best weights, of step {best.step}, had {best.correct} of {evaluation.count} right when they were "
            f"made and have {evaluation.correct} now: the machine does not compute the same twice"
        )
    network.eval()
    return Outcome(
        network=network,
        evaluation=evaluation,
        step=best.step,
        steps=schedule.steps,
        history=read_lines(folder / "metrics.jsonl"),
        wall_seconds=timer.wall_seconds,
        resumes=resumes,
    )


def _optimizer_step(
    objective: nn.Module, optimizer: Any, batch: Batch, config: TrainConfig, accelerator: "Accelerator"
) -> torch.Tensor:
    """Take one step on this process's part of the global batch; give the mean loss over it, a scalar."""
    optimizer.zero_grad()
    size = len(batch.labels)
    micro = config.micro_batch_size or size
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, size, micro):
        images = batch.images[start : start + micro].to(accelerator.device, non_blocking=True)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = batch.labels[start : start + micro].to(accelerator.device, non_blocking=True)
        last = start + micro >= size
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            # by its true size, so that a shorter last part counts for what it is
            loss = objective(images, labels) * (len(labels) / size)
            accelerator.backward(loss)
        total += loss.detach()
    if config.optim.clip_grad is not None:
        accelerator.clip_grad_norm_(objective.parameters(), config.optim.clip_grad)
    optimizer.step()
    return total


def _seed_step(seed: int, step: int, process: int) -> None:
    """Seed dropout and stochastic depth, so that nothing of the generators needs saving."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))


def _require_finite(value: float, step: int, folder: Path) -> None:
    if not math.isfinite(value):
        checkpoint = latest_checkpoint(folder / "checkpoints")
        kept = f"the last good checkpoint is {checkpoint.path.name}" if checkpoint else "there is no checkpoint yet"
        raise RunError(
            f"the loss is {value} at step {step}, so the run stops ({kept}); try a lower --lr or --clip-grad 1",
            everywhere=True,
        )


def _checkpoint_due(step: int, config: TrainConfig, timer: "_Timer", accelerator: "Accelerator") -> bool:
    """Say whether to save now; for minutes, the main process's clock decides, asked on log steps."""
    if config.checkpoint.steps is not None:
        return step % config.checkpoint.steps == 0
    if step % config.log_every:
        return False
    due = timer.since_checkpoint >= (config.checkpoint.seconds or math.inf)
    if accelerator.num_processes == 1:
        return due
    from accelerate.utils import broadcast

    return bool(broadcast(torch.tensor([due], device=accelerator.device, dtype=torch.uint8)).item())


def _save(
    folder: Path,
    step: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: _Best | None,
    accelerator: "Accelerator",
    how: dict[str, Any],
    wall_seconds: float,
    resumes: int,
    config: TrainConfig,
) -> None:
    optimizer_tensors, optimizer_facts = optimizer_state(optimizer)
    tensors = {"model": network.state_dict(), "optimizer": optimizer_tensors}
    facts: dict[str, Any] = {
        "optimizer": optimizer_facts,
        "how": how,
        "wall_seconds": wall_seconds,
        "resumes": resumes,
    }
    facts["scaler"] = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    facts["best"] = None if best is None else {"step": best.step, "correct": best.correct, "loss": best.loss}
    if best is not None and best.step != step:
        tensors["best"] = best.tensors
    try:
        save_checkpoint(folder / "checkpoints", step, tensors, facts, config.checkpoint.keep_checkpoints)
    except OSError as error:
        checkpoint = latest_checkpoint(folder / "checkpoints")
        kept = f"the last good one is {checkpoint.path.name}" if checkpoint else "there is none yet"
        raise RunError(f"the checkpoint of step {step} could not be written ({error.strerror}); {kept}") from error


def _restore(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
    how: dict[str, Any],
) -> tuple[int, _Best | None, float, int]:
    """Load the newest checkpoint, if any; give its step, best weights, wall time and the number of resumes.

    The main process chooses, so that all load the same one.
    """
    from accelerate.utils import broadcast_object_list

    chosen = [latest_checkpoint(folder / "checkpoints") if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    checkpoint = chosen[0]
    if checkpoint is None:
        return 0, None, 0.0, 0
    facts = checkpoint.facts
    network.load_state_dict(checkpoint.tensors("model"))
    restore_optimizer(optimizer, checkpoint.tensors("optimizer"), facts["optimizer"])
    if accelerator.scaler is not None and facts["scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["scaler"])
    best = None
    if facts["best"] is not None:
        same = facts["best"]["step"] == checkpoint.step
        best = _Best(**facts["best"], tensors=checkpoint.tensors("model" if same else "best"))
    _logger.info("going on from %s", checkpoint.path.name)
    for name, before in facts["how"].items():
        if how[name] != before:
            _logger.warning(
                "%s: %s before, %s now; data and schedule stay the same, the weights can differ in their last bits",
                name,
                before,
                how[name],
            )
    return checkpoint.step, best, facts["wall_seconds"], facts["resumes"] + 1


def _broadcast_buffers(network: nn.Module, accelerator: "Accelerator") -> None:
    """Give every process the main one's batch norm statistics: each saw its own part of the batches."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for buffer in network.buffers():
            buffer.copy_(broadcast(buffer.clone()))


def _sum(values: torch.Tensor, accelerator: "Accelerator") -> torch.Tensor:
    if accelerator.num_processes == 1:
        return values
    total: torch.Tensor = accelerator.reduce(values.to(accelerator.device), "sum")
    return total.cpu()


def _to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _hash(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]


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
