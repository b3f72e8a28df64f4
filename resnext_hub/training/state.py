"""What the steps of a run work on, and what of it is saved.

The state of a run is the weights, their moving average, the optimizer, the best weights so far and the step; sample
order, learning rate and random numbers are functions of the step. So a resume starts at a step and needs nothing else.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from resnext_hub.agreement import Peers
from resnext_hub.data.batches import Batch, Parcel, Position
from resnext_hub.data.dataset import Splits, StreamedPictures
from resnext_hub.errors import RequestError, RunError, StoppedRun, one_line
from resnext_hub.machine import WAIT
from resnext_hub.models.merged import grouped_convolutions
from resnext_hub.models.widths import list_widths
from resnext_hub.text import printable
from resnext_hub.training.checkpoint import BestFacts, Checkpoint, StateFacts, latest_checkpoint, save_checkpoint
from resnext_hub.training.config import GROWING_FIELDS, MACHINE_FIELDS, TrainConfig
from resnext_hub.training.evaluate import Evaluation, EvaluationStoppedError, evaluate
from resnext_hub.training.feed import StepInputs, evaluation_samples, training_loader
from resnext_hub.training.form import agree_on_factors, training_form
from resnext_hub.training.metrics import METRICS, LineLog, Timer, UnreadableLog, read_lines, read_unreadable
from resnext_hub.training.optim import build_optimizer, optimizer_state, require_same_kind, restore_optimizer
from resnext_hub.training.schedule import plan_schedule
from resnext_hub.training.stop import StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)

_NEVER = 2**62
"""A step that no run reaches."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training gives: the network with its best weights, and how they do."""

    network: nn.Module
    evaluation: Evaluation
    step: int
    """Step of the best weights."""
    epoch: float
    """Passes over the training split at that step."""
    steps: int
    epochs: float
    """Passes over the training split."""
    history: list[dict[str, Any]]
    wall_seconds: float
    resumes: int
    skipped_steps: int
    """Steps whose gradients overflowed in fp16, so that the weights were left as they were."""
    decoders: list[str]
    """What decoded the pictures to train on, in the order of use."""
    unreadable: list[dict[str, str]]
    """Pictures that could not be read: split, picture, reason."""
    merged_groups: dict[str, int]
    """How many neighbouring groups were computed as one in training, by the layer's name."""


@dataclass(kw_only=True)
class Best:
    """The best weights so far: most samples right, then the lower loss."""

    step: int
    correct: int
    loss: float
    epoch: float
    tensors: dict[str, torch.Tensor]

    def beaten_by(self, evaluation: Evaluation) -> bool:
        """Say whether other weights do better."""
        return (evaluation.correct, -evaluation.loss) > (self.correct, -self.loss)


class RunState:
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
        peers: Peers,
        on_checkpoint: Callable[[Path], None],
    ) -> None:
        self.config, self.splits, self.folder, self.accelerator = config, splits, folder, accelerator
        self.peers = peers
        self.data_config, self.on_checkpoint = data_config, on_checkpoint
        self.schedule = plan_schedule(config, splits.train.count)
        # the unwrapped network: what evaluates, and what is saved
        self.network = network.to(accelerator.device).to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.network, decay=config.ema, use_warmup=True) if config.ema else None
        self.optimizer = build_optimizer(self.network, config.optim, scaled=accelerator.scaler is not None)
        self.stop = StopSignal(accelerator.num_processes, WAIT)
        self.inputs = StepInputs(
            config,
            data_config,
            classes=len(splits.label_names),
            steps=self.schedule.steps,
            device=accelerator.device,
            process=accelerator.process_index,
        )
        self.eval_samples = evaluation_samples(splits.eval, data_config, config.loader.max_image_pixels)
        self.how = {
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": precision,
            "device": accelerator.device.type,
            "decoder": config.loader.decoder,
            "compile": config.compile,
        }
        self.decoders: list[str] = [config.loader.decoder]
        self.merged_groups: dict[str, int] | None = None
        """How many neighbouring groups are computed as one, by the layer's name; None until it is chosen."""
        self.step = self.resumes = self.skipped_steps = 0
        self.position = Position(0, 0)
        """Where a stream stands; of other data it follows from the step."""
        self.evaluated = True
        """Whether the evaluation that is due at this step, if any, was done."""
        self.first_bad_step = torch.tensor(_NEVER, device=accelerator.device)
        self.best: Best | None = None
        self.timer = Timer(0.0, 0)
        self.unreadable = UnreadableLog(folder, peers, config.data.max_bad_fraction)
        self.metrics: LineLog | None = None
        self.samples: LineLog | None = None

    @property
    def published(self) -> nn.Module:
        """What is evaluated and kept: the moving average where there is one."""
        return self.network if self.ema is None else self.ema.module

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def streaming(self) -> bool:
        """Whether the training pictures are read in order."""
        return isinstance(self.splits.train, StreamedPictures)

    @property
    def workers(self) -> int:
        """Reading processes of this process."""
        assert self.config.loader.workers is not None
        return self.config.loader.workers

    @property
    def epoch(self) -> float:
        """Passes over the training split so far; whole ones only, if nothing says how long one is."""
        count = self.splits.train.count
        if self.streaming:
            return round(self.position.epoch + (self.position.place / count if count else 0.0), 4)
        return self._epoch_at(self.step)

    def restore(self) -> None:
        """Load the newest checkpoint, if any. The main process alone reads it, and sends it to the others."""
        checkpoint = self.peers.from_main(self._newest_checkpoint)
        if checkpoint is None:
            return

        def tensors(name: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return self.peers.share_tensors(lambda: checkpoint.matching(name, expected))

        facts = checkpoint.facts
        checkpoint.require_settings(self.fixed_settings)
        if checkpoint.step > self.schedule.steps:
            raise checkpoint.foreign(f"it is of step {checkpoint.step}, and the run has {self.schedule.steps}")
        weights = self.network.state_dict()
        self.network.load_state_dict(tensors("model", weights))
        moments = self.peers.share_tensors(lambda: checkpoint.tensors("optimizer"))
        try:
            require_same_kind(self.optimizer, facts.optimizer)
            restore_optimizer(self.optimizer, moments, facts.optimizer)
            if self.accelerator.scaler is not None and facts.scaler is not None:
                self.accelerator.scaler.load_state_dict(facts.scaler)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise checkpoint.foreign(f"its optimizer's state does not fit: {one_line(error)}") from error
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors("ema", self.ema.module.state_dict()))
        if facts.best is not None:
            same = facts.best.step == checkpoint.step
            name = "best" if not same else "model" if self.ema is None else "ema"
            self.best = Best(
                step=facts.best.step,
                correct=facts.best.correct,
                loss=facts.best.loss,
                epoch=self._epoch_at(facts.best.step) if facts.best.epoch is None else facts.best.epoch,
                tensors=tensors(name, weights),
            )
        self.step, self.resumes = checkpoint.step, facts.resumes + 1
        self.skipped_steps = facts.skipped_steps
        self.evaluated = facts.evaluated
        self.position = Position(*facts.position)
        self.timer = Timer(facts.wall_seconds, self.step)
        _logger.info("going on from %s", checkpoint.path.name)
        decoders = facts.decoders
        self.decoders = decoders if decoders[-1] == self.how["decoder"] else [*decoders, self.how["decoder"]]
        self.merged_groups = facts.merged_groups or {}
        layers = grouped_convolutions(self.network)
        if not all(n in layers and f > 0 and layers[n].groups % f == 0 for n, f in self.merged_groups.items()):
            raise checkpoint.foreign("its merged groups are of another model")
        for name, before in facts.how.items():
            if name in self.how and self.how[name] != before:
                pixels = "in their last bits" if name != "decoder" else "as the pixels of JPEGs do by a little"
                _logger.warning(
                    "%s: %s before, %s now; data and schedule stay the same, the weights can differ %s",
                    name,
                    printable(before),
                    self.how[name],
                    pixels,
                )

    def _newest_checkpoint(self) -> Checkpoint | None:
        checkpoint = latest_checkpoint(self.checkpoints)
        if checkpoint is not None and checkpoint.facts.fingerprint != self.splits.fingerprint:
            raise RequestError(
                f"the images of {printable(self.splits.dataset_id)} have changed since {checkpoint.path.name} was "
                "written; give another --output-dir, or put them back"
            )
        return checkpoint

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """The settings that decide the result, without places on this machine: the dataset has a fingerprint."""
        settings = self.config.to_flat()
        left_out = MACHINE_FIELDS | GROWING_FIELDS | {"dataset"}
        if settings["model"].startswith("local-dir:"):
            left_out = left_out | {"model"}
        return {name: value for name, value in settings.items() if name not in left_out}

    def _epoch_at(self, step: int) -> float:
        """Return the passes over the training split at a step; 0 for a stream of unknown length."""
        count = self.splits.train.count
        return round(step * self.config.batch_size / count, 4) if count else 0.0

    def build_form(self) -> nn.Module:
        """Give the form in which the network is trained; the main process chooses it, once for all of the run."""
        config, before = self.config, self.merged_groups
        if before is None or config.merge_groups != "auto":
            part = config.batch_size // self.accelerator.num_processes
            shape = (min(config.micro_batch_size or part, part), *self.data_config["input_size"])
            self.merged_groups = agree_on_factors(
                self.network, shape, config.merge_groups, self.how["precision"], self.accelerator
            )
        assert self.merged_groups is not None
        if before is not None and before != self.merged_groups:
            _logger.warning("groups are merged in another way than before; the weights can differ in their last bits")
        if self.merged_groups:
            layers = grouped_convolutions(self.network)
            widths = {name: layers[name].in_channels // layers[name].groups for name in self.merged_groups}
            merged = list_widths(
                (name, widths[name], factor * widths[name]) for name, factor in self.merged_groups.items()
            )
            _logger.info("channels of merged groups: %s", merged)
        elif config.merge_groups not in ("auto", "off"):
            _logger.warning(
                "no groups are merged: none of the network's can be made wider within %s channels, "
                "the width that --merge-groups gives",
                config.merge_groups,
            )
        return training_form(self.network, self.merged_groups)

    def open_logs(self, stack: contextlib.ExitStack) -> None:
        """Open the logs of this process, without the lines of steps that are to be taken again."""
        process = self.accelerator.process_index
        if self.accelerator.is_main_process:
            self.metrics = stack.enter_context(
                LineLog(self.folder / "metrics.jsonl", self.step, self.evaluated, METRICS)
            )
        if self.config.log_samples:
            self.folder.mkdir(parents=True, exist_ok=True)  # on another host than the main process's
            self.samples = stack.enter_context(LineLog(self.folder / f"samples-{process}.jsonl", self.step))

    def build_loader(self) -> DataLoader[Parcel]:
        """Give this process's part of every step that is left."""
        return training_loader(
            self.config,
            self.splits.train,
            self.data_config,
            start=self.step,
            stop=self.schedule.steps,
            position=self.position,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def stepped(self, batch: Batch, loss: torch.Tensor, skipped: bool) -> None:
        """Count a step that was taken; nothing here waits for the device.

        Raises:
            RunError: If more pictures cannot be read than may be.
        """
        before = self.position
        self.step += 1
        self.skipped_steps += skipped
        self.position = batch.end or before
        every = self.config.eval_every
        completes = self.position.epoch // every > before.epoch // every
        self.evaluated = not (completes or self.step in self.schedule.evaluations)
        self.first_bad_step.clamp_(max=torch.where(loss.isfinite(), _NEVER, self.step))
        if self.ema is not None:
            self.ema.update(self.network, step=self.step)
        self.unreadable.note(
            "training", self.splits.train.count or self.step * self.config.batch_size, batch.unreadable
        )

    def log_samples(self, batch: Batch, images: torch.Tensor) -> None:
        """Write down which samples the step took, and hashes of their pixels, if that is asked for."""
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

    def say_compiled(self) -> None:
        """Say what compiling cost, which the first step did, and leave it out of the training speed."""
        _logger.info("compiled in the first step, which took %.0f s", self.timer.restart(self.step))

    def log_due(self) -> bool:
        """Say whether this step has a log line."""
        return self.step % self.config.log_every == 0 or self.step == self.schedule.steps

    def log_step(self, lr: float, loss: float) -> dict[str, str]:
        """Write the log line of a step; give what of it belongs on a progress bar."""
        speed, wait = self.timer.lap(self.step, self.config.batch_size)
        if self.metrics:
            facts = {"lr": lr, "loss": loss, "images_per_second": speed, "data_wait": wait}
            self.metrics.write(step=self.step, epoch=self.epoch, **facts)
        return {"loss": f"{loss:.3f}", "images/s": f"{speed:.0f}", "data_wait": f"{wait:.0%}"}

    def evaluate(self, network: nn.Module) -> Evaluation:
        """Evaluate a network with the main process's batch norm statistics.

        Raises:
            EvaluationStoppedError: If SIGTERM came to any process.
            RunError: If more pictures cannot be read than may be.
        """
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
        missing = evaluation.total - evaluation.count
        self.unreadable.note("evaluation", evaluation.total, evaluation.unreadable, missing)
        return evaluation

    def evaluate_step(self) -> bool:
        """Evaluate, and keep the weights if they are the best so far; say if it was done, not stopped by SIGTERM."""
        try:
            with self.timer.apart():
                evaluation = self.evaluate(self.published)
        except EvaluationStoppedError:
            self.stop.stopping()
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
            self.best = Best(
                step=self.step, correct=evaluation.correct, loss=evaluation.loss, epoch=self.epoch, tensors=tensors
            )
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
        """Write a checkpoint.

        Raises:
            RunError: If it cannot be written, or the weights are not finite.
        """
        # the loss of a step is finite still when that step has spoilt the weights: no such state is worth keeping
        if not torch.nn.utils.get_total_norm(self.network.parameters()).isfinite():
            self._stop_not_finite("weights are not finite", self.step)
        with self.timer.apart():
            self.unreadable.collect()
            self.peers.from_main(self._save)
        self.timer.checkpointed()

    def _save(self) -> None:
        optimizer_tensors, optimizer_facts = optimizer_state(self.optimizer)
        tensors = {"model": self.network.state_dict(), "optimizer": optimizer_tensors}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        scaler, best = self.accelerator.scaler, self.best
        if best is not None and best.step != self.step:
            tensors["best"] = best.tensors
        facts = StateFacts(
            optimizer=optimizer_facts,
            scaler=None if scaler is None else scaler.state_dict(),
            best=None
            if best is None
            else BestFacts(step=best.step, correct=best.correct, loss=best.loss, epoch=best.epoch),
            how=self.how,
            decoders=self.decoders,
            wall_seconds=self.timer.wall_seconds,
            resumes=self.resumes,
            skipped_steps=self.skipped_steps,
            merged_groups=self.merged_groups,
            evaluated=self.evaluated,
            position=(self.position.epoch, self.position.place),
            fingerprint=self.splits.fingerprint,
            settings=self.fixed_settings,
        )
        try:
            keep = self.config.checkpoint.keep_checkpoints
            self.on_checkpoint(save_checkpoint(self.checkpoints, self.step, tensors, facts, keep))
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the checkpoint of step {self.step} could not be written ({one_line(error)}); {self._last_good()}",
                everywhere=True,
            ) from error

    def _stop_not_finite(self, what: str, step: int) -> NoReturn:
        good = self.peers.from_main(self._last_good)
        raise RunError(
            f"the {what} at step {step}, so the run stops; {good}; try a lower --lr, or --clip-grad 1",
            everywhere=True,
        )

    def say_stopped(self) -> NoReturn:
        """End the run after a signal; the state of this step is saved."""
        raise StoppedRun(
            f"stopped by {self.stop.number.name} after step {self.step} of {self.schedule.steps}, which is saved; the "
            "same command goes on from there",
            self.stop.number,
        )

    def finish(self) -> Outcome:
        """Evaluate the best weights once more, as they will be published."""
        if self.best is None:  # an evaluation was stopped at the very end, and again when the run went on
            self.say_stopped()
        self.network.load_state_dict(self.best.tensors)
        try:
            evaluation = self.evaluate(self.network)
        except EvaluationStoppedError:
            self.stop.stopping()
            self.say_stopped()
        if evaluation.correct != self.best.correct:  # without deterministic algorithms, an accelerator may do so
            _logger.warning(
                "the best weights had %d right at step %d and have %d now, which is what is recorded: this device does "
                "not compute the same twice (--deterministic)",
                self.best.correct,
                self.best.step,
                evaluation.correct,
            )
        self.unreadable.collect()
        return Outcome(
            network=self.network.eval(),
            evaluation=evaluation,
            step=self.best.step,
            epoch=self.best.epoch,
            steps=self.schedule.steps,
            epochs=self.epoch,
            history=read_lines(self.folder / "metrics.jsonl", *METRICS),
            wall_seconds=self.timer.wall_seconds,
            resumes=self.resumes,
            skipped_steps=self.skipped_steps,
            decoders=self.decoders,
            unreadable=read_unreadable(self.folder),
            merged_groups=self.merged_groups or {},
        )

    def _last_good(self) -> str:
        checkpoint = latest_checkpoint(self.checkpoints)
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
