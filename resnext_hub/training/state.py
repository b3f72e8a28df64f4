"""The state of a run: saved in checkpoints, restored on resume.

The state consists of the weights, their moving average, the optimizer, the best weights so far and the step. Sample
order, learning rate and random numbers are functions of the step, so they need not be saved.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.kernels.merged import grouped_convolutions
from resnext_hub.kernels.training_view import agree_on_factors, build_training_view
from resnext_hub.kernels.widths import list_widths
from resnext_hub.processes.peers import Peers
from resnext_hub.text import printable
from resnext_hub.training.averaging import StartAverage
from resnext_hub.training.checkpoint import BestFacts, Checkpoint, StateFacts, latest_checkpoint
from resnext_hub.training.checkpoint_writer import Snapshot, host_copy
from resnext_hub.training.config import fixed_settings
from resnext_hub.training.evaluation import AnyEvaluation
from resnext_hub.training.multi_label import MultiLabelEvaluation
from resnext_hub.training.optim import build_optimizer, optimizer_state, require_same_kind, restore_optimizer
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)

_NEVER = 2**62
"""A step number beyond that of any run."""


@dataclass(kw_only=True)
class Best:
    """The best weights so far, by score, then by loss."""

    step: int
    score: float
    """What they were chosen by, see `score_of`."""
    correct: int
    loss: float
    epoch: float
    tensors: dict[str, torch.Tensor]

    def beaten_by(self, score: float, loss: float) -> bool:
        """Return whether other weights are better."""
        return (score, -loss) > (self.score, -self.loss)


def score_of(evaluation: AnyEvaluation, best_by: str | None) -> float:
    """Return the number by which weights are compared; more is better.

    Args:
        evaluation: Their evaluation.
        best_by: `top1`, `macro-recall`, `macro-f1`, `map` or `loss`.
    """
    if best_by == "top1":
        return evaluation.correct
    if best_by == "map":
        assert isinstance(evaluation, MultiLabelEvaluation)
        return evaluation.mean_average_precision
    if best_by == "loss":
        return -evaluation.loss
    return evaluation.macro_recall if best_by == "macro-recall" else evaluation.macro_f1


class TrainingState:
    """Everything that a step changes.

    Args:
        plan: The run.
        model: The model in its initial state; it is the one that is evaluated, saved and published.
        accelerator: The accelerator of this process.
        peers: The processes of the run.
    """

    def __init__(self, plan: Plan, model: nn.Module, accelerator: "Accelerator", peers: Peers) -> None:
        self.plan, self.accelerator, self.peers = plan, accelerator, peers
        config = plan.config
        self.model = model.to(accelerator.device).to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.optimizer = build_optimizer(
            self.model,
            config.optim,
            scaled=accelerator.scaler is not None,
            layer_decay=config.finetune.layer_decay,
            head_lr=config.finetune.head_lr,
        )
        self.how = {
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": plan.precision,
            "device": accelerator.device.type,
            "decoder": config.loader.decoder,
            "compile": config.compile,
        }
        """What the exact weights depend on besides the settings."""
        self.decoders: list[str] = [config.loader.decoder]
        self.merged_groups: dict[str, int] | None = None
        """Number of neighboring groups that are computed as one, by layer name; None until chosen."""
        self.step = self.resumes = self.skipped_steps = 0
        self.average = StartAverage(config.finetune.average_with_start) if config.finetune.average_with_start else None
        self.evaluated = not config.finetune.fit_head
        """Whether no evaluation is due at this step, or it is done."""
        self.best: Best | None = None
        self.stale = 0
        """Evaluations in a row without an improvement that counts for early stopping."""
        self.reached: float | None = None
        """The score, per image if it is a count, from which an improvement counts."""
        self.wall_seconds = 0.0
        """Wall time of the run up to the checkpoint that it resumed from."""
        self._first_bad_step = torch.tensor(_NEVER, device=accelerator.device)

    @property
    def published(self) -> nn.Module:
        """The model to evaluate and publish: the moving average if there is one, averaged with the start if asked."""
        model = self.model if self.ema is None else self.ema.module
        return model if self.average is None else self.average.of(model)

    def keep_start(self) -> None:
        """Keep the weights as the start of `average_with_start`, if all layers are trained from this step on."""
        if self.average is not None and not self.plan.schedule.head_only(self.step):
            self.average.keep_start(self.model)

    @property
    def done(self) -> bool:
        """Whether all steps are done, or the run stopped early."""
        return self.step >= self.plan.schedule.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether too many evaluations in a row brought no improvement."""
        patience = self.plan.config.finetune.early_stopping
        return patience is not None and self.stale >= patience

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self._epoch_at(self.step)

    def _epoch_at(self, step: int) -> float:
        """Return the passes over the training split at a step."""
        return round(step * self.plan.config.batch_size / self.plan.splits.train.count, 4)

    def advance(self, loss: torch.Tensor, skipped: bool) -> None:
        """Count an optimizer step, without waiting for the device.

        Args:
            loss: Its mean loss, a scalar on the device.
            skipped: Whether the optimizer skipped it because fp16 gradients overflowed.
        """
        self.step += 1
        self.skipped_steps += skipped
        self.evaluated = self.step not in self.plan.schedule.evaluations
        self._first_bad_step.clamp_(max=torch.where(loss.isfinite(), _NEVER, self.step))
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def first_bad_step(self) -> int:
        """Return the first step, over all processes, at which the loss was not finite."""
        return int(self.accelerator.gather(self._first_bad_step).min())

    def keep_best(self, evaluation: AnyEvaluation) -> bool:
        """Keep a copy of the weights if they are the best so far, and count evaluations without an improvement.

        Returns:
            Whether they are the best so far; False if the last weights of the run are kept, whatever their score.
        """
        best_by = self.plan.config.balance.best_by
        score = self.step if best_by == "last" else score_of(evaluation, best_by)
        value = score / evaluation.count if best_by == "top1" else score
        if self.reached is None or value > self.reached + self.plan.config.finetune.early_stopping_delta:
            self.stale, self.reached = 0, value
        else:
            self.stale += 1
        is_best = self.best is None or self.best.beaten_by(score, evaluation.loss)
        if is_best:
            self.best = Best(
                step=self.step,
                score=score,
                correct=evaluation.correct,
                loss=evaluation.loss,
                epoch=self.epoch,
                tensors=host_copy(self.published.state_dict()),
            )
        return is_best and best_by != "last"

    def synchronize_buffers(self) -> None:
        """Broadcast the batch norm statistics of the main process, because each process has its own."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for model in [self.model] if self.ema is None else [self.model, self.ema.module]:
                for buffer in model.buffers():
                    buffer.copy_(broadcast(buffer.clone()))

    def weights_are_finite(self) -> bool:
        """Return whether all weights are finite; the step after a finite loss can still overflow."""
        return bool(torch.nn.utils.get_total_norm(self.model.parameters()).isfinite())

    def build_view(self) -> nn.Module:
        """Return the training view of the model; the main process chooses the merged groups, once per run."""
        config, before = self.plan.config, self.merged_groups
        if before is None or config.merge_groups != "auto":
            shape = (config.images_per_pass(self.accelerator.num_processes), *self.plan.input.input_size)
            self.merged_groups = agree_on_factors(
                self.model, shape, config.merge_groups, self.plan.precision, self.accelerator
            )
        assert self.merged_groups is not None
        if before is not None and before != self.merged_groups:
            _logger.warning(
                "the merged groups are not those from before the resume, so weights may differ in the last bits"
            )
        if self.merged_groups:
            layers = grouped_convolutions(self.model)
            widths = {name: layers[name].in_channels // layers[name].groups for name in self.merged_groups}
            merged = list_widths(
                (name, widths[name], factor * widths[name]) for name, factor in self.merged_groups.items()
            )
            _logger.info("channels of merged groups: %s", merged)
        elif config.merge_groups not in ("auto", "off"):
            _logger.warning(
                "no groups are merged, because --merge-groups %s is less than twice the width of every group in the "
                "model",
                config.merge_groups,
            )
        return build_training_view(self.model, self.merged_groups)

    def restore(self) -> None:
        """Load the newest checkpoint, if any; the main process reads it and sends it to the others.

        Raises:
            RequestError: If it belongs to another run, or the dataset has changed.
        """
        checkpoint = self.peers.from_main(self._newest_checkpoint)
        if checkpoint is None:
            return
        facts = checkpoint.facts
        checkpoint.require_settings(self._fixed_settings())
        if checkpoint.step > self.plan.schedule.steps:
            raise checkpoint.mismatch(
                f"it was written at step {checkpoint.step}, but this run has only {self.plan.schedule.steps} steps"
            )
        self._restore_tensors(checkpoint)
        self.step, self.resumes = checkpoint.step, facts.resumes + 1
        self.skipped_steps = facts.skipped_steps
        self.stale, self.reached = facts.stale, facts.reached
        self.evaluated = facts.evaluated
        self.wall_seconds = facts.wall_seconds
        _logger.info("resuming from %s", checkpoint.path.name)
        decoders = facts.decoders
        self.decoders = decoders if decoders[-1] == self.how["decoder"] else [*decoders, self.how["decoder"]]
        self.merged_groups = facts.merged_groups or {}
        layers = grouped_convolutions(self.model)
        if not all(n in layers and f > 0 and layers[n].groups % f == 0 for n, f in self.merged_groups.items()):
            raise checkpoint.mismatch("its merged groups belong to a different model")
        for name, before in facts.how.items():
            exact = name == "processes" and self.plan.config.elastic is not None
            if name in self.how and self.how[name] != before and not exact:
                effect = (
                    "in the last bits"
                    if name != "decoder"
                    else "slightly, because JPEGs are decoded to different pixels"
                )
                _logger.warning(
                    "%s: %s before the resume, %s now; data and schedule are unchanged, but weights may differ %s",
                    name,
                    printable(before),
                    self.how[name],
                    effect,
                )

    def _newest_checkpoint(self) -> Checkpoint | None:
        checkpoint = latest_checkpoint(self.plan.folder.checkpoints)
        splits = self.plan.splits
        if checkpoint is not None and checkpoint.facts.fingerprint != splits.fingerprint:
            raise RequestError(
                f"the images of {printable(splits.dataset_id)} have changed since {checkpoint.path.name} was "
                f"written; restore them, or choose another {setting('output_dir')}"
            )
        return checkpoint

    def _restore_tensors(self, checkpoint: Checkpoint) -> None:
        """Load weights, optimizer, moving average and best weights."""

        def tensors(name: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return self.peers.share_tensors(lambda: checkpoint.matching(name, expected))

        facts = checkpoint.facts
        weights = self.model.state_dict()
        self.model.load_state_dict(tensors("model", weights))
        moments = self.peers.share_tensors(lambda: checkpoint.tensors("optimizer"))
        try:
            require_same_kind(self.optimizer, facts.optimizer)
            restore_optimizer(self.optimizer, moments, facts.optimizer)
            if self.accelerator.scaler is not None and facts.scaler is not None:
                self.accelerator.scaler.load_state_dict(facts.scaler)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise checkpoint.mismatch(f"its optimizer state does not match: {one_line(error)}") from error
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors("ema", self.ema.module.state_dict()))
        if self.average is not None and checkpoint.step > self.plan.schedule.head_steps:
            self.average.start = tensors("start", weights)
        if facts.best is not None:
            same = facts.best.step == checkpoint.step
            same = same and self.average is None
            name = "best" if not same else "model" if self.ema is None else "ema"
            self.best = Best(
                step=facts.best.step,
                score=facts.best.correct if facts.best.score is None else facts.best.score,
                correct=facts.best.correct,
                loss=facts.best.loss,
                epoch=self._epoch_at(facts.best.step) if facts.best.epoch is None else facts.best.epoch,
                tensors=tensors(name, weights),
            )

    def snapshot(self, wall_seconds: float) -> Snapshot:
        """Return a copy of the state for a checkpoint.

        Args:
            wall_seconds: Wall time of the run so far.
        """
        optimizer_tensors, optimizer_facts = optimizer_state(self.optimizer)
        changing = {"model": self.model.state_dict(), "optimizer": optimizer_tensors}
        constant = {}
        if self.ema is not None:
            changing["ema"] = self.ema.module.state_dict()
        scaler, best = self.accelerator.scaler, self.best
        if self.average is not None and self.average.start is not None:
            constant["start"] = self.average.start
        if best is not None and (best.step != self.step or self.average is not None):
            constant["best"] = best.tensors
        facts = StateFacts(
            optimizer=optimizer_facts,
            scaler=None if scaler is None else scaler.state_dict(),
            best=None
            if best is None
            else BestFacts(step=best.step, correct=best.correct, loss=best.loss, epoch=best.epoch, score=best.score),
            how=self.how,
            decoders=self.decoders,
            wall_seconds=wall_seconds,
            resumes=self.resumes,
            skipped_steps=self.skipped_steps,
            stale=self.stale,
            reached=self.reached,
            merged_groups=self.merged_groups,
            evaluated=self.evaluated,
            fingerprint=self.plan.splits.fingerprint,
            settings=self._fixed_settings(),
        )
        return Snapshot.take(self.step, changing, constant, facts)

    def _fixed_settings(self) -> dict[str, Any]:
        """Return the settings that determine the result; class weights by their digest, since a file can change."""
        return fixed_settings(self.plan.config) | {"class_weights": self.plan.balance.digest or "none"}
