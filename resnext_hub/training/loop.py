"""The training loop, in the order of events."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from resnext_hub.agreement import Peers
from resnext_hub.data.batches import read_batches
from resnext_hub.data.dataset import Splits
from resnext_hub.errors import RunError, one_line
from resnext_hub.machine import quiet_compilers
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.form import require_shared_tensors
from resnext_hub.training.optim import lr_at, set_lr
from resnext_hub.training.state import Outcome, RunState

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)


class Objective(nn.Module):
    """The loss as a module, so that what wraps it (autocast, data parallelism) leaves the network itself untouched."""

    def __init__(self, network: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Map pictures `(N, C, H, W)` and labels `(N,)`, or targets `(N, classes)`, to the mean cross entropy."""
        return F.cross_entropy(self.network(images).float(), labels, label_smoothing=self.label_smoothing)


def train(
    config: TrainConfig,
    splits: Splits,
    network: nn.Module,
    data_config: dict[str, Any],
    folder: Path,
    accelerator: "Accelerator",
    precision: str,
    peers: Peers,
    on_checkpoint: Callable[[Path], None] = lambda path: None,
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
        peers: The processes of the run.
        on_checkpoint: Called with each checkpoint that the main process has written.

    Raises:
        RunError: If the loss is not finite, or more pictures cannot be read than may be.
        StoppedRun: If SIGTERM asked for it; the state was saved.
    """
    run = RunState(config, splits, network, data_config, folder, accelerator, precision, peers, on_checkpoint)
    run.restore()
    form = run.build_form()
    if config.compile:
        form.compile(dynamic=False)
    # placed already: Accelerate would move the module once more, which makes other tensors of its buffers
    objective, optimizer = accelerator.prepare(
        Objective(form, config.label_smoothing), run.optimizer, device_placement=[False, False]
    )
    require_shared_tensors(form, run.network)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.stop)
        run.open_logs(stack)
        if not run.evaluated and not run.evaluate_step():
            run.say_stopped()
        batches = stack.enter_context(contextlib.closing(read_batches(run.build_loader())))
        objective.train()
        compiling = config.compile
        bar = stack.enter_context(
            tqdm(total=run.schedule.steps, initial=run.step, unit="step", disable=None if run.metrics else True)
        )
        run.timer.restart(run.step)  # what came before is no training
        while run.step < run.schedule.steps:
            with run.timer.waiting():
                batch = next(batches)
            lr = lr_at(run.step, run.schedule.steps, run.schedule.warmup_steps, config.optim.lr or 0.0)
            set_lr(run.optimizer, lr)
            _seed_step(config.seed, run.step, accelerator.process_index)
            images, targets = run.inputs(batch, run.step)
            with _compiling() if config.compile else contextlib.nullcontext():
                loss = _optimizer_step(objective, optimizer, images, targets, config, accelerator)
            run.stepped(batch, loss, optimizer.step_was_skipped)
            if compiling:
                run.say_compiled()
                compiling = False
            bar.update()
            run.log_samples(batch, images)

            stopping = run.stop.agreed()
            save_now = stopping or run.checkpoint_due()
            if run.log_due() or save_now:
                value = run.mean_loss(loss)
                if run.log_due():
                    bar.set_postfix(run.log_step(lr, value))
            if not run.evaluated:
                stopping = stopping or not run.evaluate_step()
            if save_now or stopping:
                run.save()
            if stopping:
                run.say_stopped()
        return run.finish()


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


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Say in a line that the compiler failed, and what to do."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        with quiet_compilers():
            yield
    except TorchDynamoException as error:
        raise RunError(
            f"the network cannot be compiled here ({one_line(error)[:200]}); without --compile the run goes on"
        ) from error


def _seed_step(seed: int, step: int, process: int) -> None:
    """Seed dropout and stochastic depth, so that nothing of the generators needs saving."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))
