"""Write the results of a run: model folder, plots, card, predictions and, last, the record."""

import contextlib
import dataclasses
import itertools
import logging
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

import resnext_hub
from resnext_hub.cards.card_file import Kept, take_apart
from resnext_hub.cards.eval_results import EVAL_RESULTS, eval_results
from resnext_hub.cards.model_card import TAGS, render_card
from resnext_hub.data.images import IndexedImages
from resnext_hub.errors import RunError, one_line
from resnext_hub.export.model_folder import write_model
from resnext_hub.facts import (
    BaseModelFacts,
    CalibrationFacts,
    DatasetFacts,
    HardwareFacts,
    ModelFacts,
    SampleFacts,
)
from resnext_hub.files import new_folder, read_json, read_regular, write_atomic
from resnext_hub.hub.publish import CARD_BYTES
from resnext_hub.machine import git_commit, processor_name, versions
from resnext_hub.models.lookup import ModelSource, needs_plugin, portable_architecture, variant_of
from resnext_hub.models.ood import OOD, write_ood
from resnext_hub.models.saved import CONFIG, WEIGHTS
from resnext_hub.plots.reliability import Confidences
from resnext_hub.plots.write import write_plots, write_samples
from resnext_hub.record import PLOTS, RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.evaluation_facts import evaluation_facts
from resnext_hub.runs.ood_facts import ood_facts
from resnext_hub.runs.public import public_model, public_settings
from resnext_hub.runs.recipes import QUICKSTART
from resnext_hub.runs.summary import class_counts
from resnext_hub.runs.tables import write_confusion, write_predictions
from resnext_hub.settings import flag_of
from resnext_hub.text import listing, printable
from resnext_hub.trackers.fan_out import Trackers
from resnext_hub.training.calibrate import Calibration
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.feed import evaluation_samples
from resnext_hub.training.loop import Outcome
from resnext_hub.training.multi_label import MultiLabelEvaluation
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)

_DEFAULTS = TrainConfig().to_flat()

_MODEL_FILES = {"README.md", CONFIG, WEIGHTS, OOD, "plots", EVAL_RESULTS}
_SAMPLES = "samples.png"


def write_results(plan: Plan, outcome: Outcome, accelerator: "Accelerator", trackers: Trackers) -> RunRecord:
    """Write model folder, plots, card, predictions and record, and complete the trackers; return the record.

    Raises:
        RunError: If they cannot be written, or the exported model differs from the trained one.
    """
    try:
        _write_files(plan, outcome, accelerator, trackers)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the results could not be written to {printable(plan.folder)}: {one_line(error)}; training is complete "
            "and saved; rerun the same command to write them"
        ) from error
    return RunRecord.load(plan.folder.record)


def _write_files(plan: Plan, outcome: Outcome, accelerator: "Accelerator", trackers: Trackers) -> None:
    """Write all results; the record comes last, because it marks the run as finished."""
    folder, splits, evaluation = plan.folder, plan.splits, outcome.final.evaluation
    kept = _kept_of_card(folder)
    _move_foreign_files(folder.model / "plots", folder.path / "model.plots", set(PLOTS))
    _move_foreign_files(folder.model, folder.model, _MODEL_FILES)
    _move_foreign_files(folder.plots, folder.plots, {*PLOTS, _SAMPLES, folder.report.name})
    with new_folder(folder.model) as model:
        digest = _write_model(plan, outcome, model)
        record = _record_of(plan, outcome, accelerator, digest)
        write_predictions(evaluation, folder.predictions)
        if outcome.final.test is not None:
            write_predictions(outcome.final.test, folder.test_predictions)
        if not record.evaluation.is_multi_label:
            write_confusion(record, folder.confusion)
        with new_folder(folder.plots) as aside:
            panels = _panels(outcome.final.calibration)
            record = dataclasses.replace(record, plots=write_plots(record, aside, panels))
            if isinstance(splits.eval, IndexedImages):  # not published: the images may be under another license
                most = plan.config.loader.max_image_pixels
                write_samples(splits.eval, evaluation, splits.label_names, aside / _SAMPLES, most)
        (model / "plots").mkdir()
        for name in record.plots:
            shutil.copyfile(folder.plots / name, model / "plots" / name)
        config = read_json(model / CONFIG, dict[str, Any], "")
        write_atomic(model / "README.md", render_card(record, kept=kept, config=config))
        for name, text in eval_results(record).items():
            (model / name).parent.mkdir(exist_ok=True)
            write_atomic(model / name, text)
    unmeasured = [name for name, count in zip(record.label_names, record.reported.measured, strict=True) if not count]
    if unmeasured:
        _logger.warning(
            "these classes have no %s images, so their accuracy is unknown: %s",
            "evaluation" if record.test is None else "test",
            listing(unmeasured, 20),
        )
    images = {f"plots/{path.stem}": path for path in sorted(folder.plots.glob("*.png"))}
    trackers.finish(outcome.history, images, outcome.steps)
    record.save(folder.record)


def _panels(calibration: Calibration | None) -> list[Confidences]:
    """Return the predictions before and after calibration; none without calibration."""
    if calibration is None:
        return []
    titles = ("As trained", "Calibrated" if calibration.before_test is not None else "Calibrated (cross-fitted)")
    return [
        Confidences(title=title, probabilities=probabilities, right=right)
        for title, (probabilities, right) in zip(titles, calibration.shown, strict=True)
    ]


def _write_model(plan: Plan, outcome: Outcome, folder: Path) -> str:
    """Write weights and config.json; return the SHA-256 of the weights."""
    evaluation = outcome.final.evaluation
    architecture, model_args = portable_architecture(plan.source)
    variant = variant_of(plan.source)
    ood = {} if outcome.ood is None else {"ood_sha256": write_ood(outcome.ood.score, folder)}
    accept = {f"{precision:g}": lowest for precision, lowest in outcome.final.accept.items()}
    return write_model(
        outcome.model,
        folder,
        architecture=architecture,
        model_args=model_args,
        input=plan.input,
        label_names=plan.splits.label_names,
        license=None,
        plugin_facts={
            "version": resnext_hub.__version__,
            "variant": variant.name if variant else None,
            "cardinality": variant.cardinality if variant else None,
            "base_width": variant.base_width if variant else None,
            **({} if plan.config.tta == "none" else {"tta": plan.config.tta}),
            **({"accept_thresholds": accept} if accept else {}),
            **ood,
        },
        thresholds=evaluation.thresholds.tolist() if isinstance(evaluation, MultiLabelEvaluation) else None,
    )


def _record_of(plan: Plan, outcome: Outcome, accelerator: "Accelerator", weights_sha256: str) -> RunRecord:
    """Return the record of a finished run."""
    config, splits, calibration = plan.config, plan.splits, outcome.final.calibration
    return RunRecord(
        name=printable(plan.folder.path.resolve().name),
        config=public_settings(config, splits),
        changed=[name for name, value in config.to_flat().items() if value != _DEFAULTS[name]],
        command=_command(plan),
        model=_model_facts(plan, outcome.model, weights_sha256),
        base_model=_base_model(plan.source),
        dataset=_dataset_facts(plan, outcome),
        label_names=list(splits.label_names),
        steps=outcome.steps,
        planned_steps=outcome.planned_steps,
        epochs=outcome.epochs,
        evaluation=evaluation_facts(plan, outcome, "evaluation"),
        test=None if outcome.final.test is None else evaluation_facts(plan, outcome, "test"),
        calibration=None
        if calibration is None
        else CalibrationFacts(temperature=calibration.temperature, images=calibration.images),
        ood=[]
        if outcome.ood is None
        else ood_facts(outcome.ood, outcome.model, plan.input, splits.dataset_id, config.eval_batch_size),
        sample=_sample(plan, outcome.model),
        history=outcome.history,
        versions=versions(),
        hardware=HardwareFacts(
            device=accelerator.device.type,
            name=processor_name(accelerator.device),
            threads=torch.get_num_threads(),
            mixed_precision=plan.precision,  # type: ignore[arg-type] # resolved, so it is one of the allowed values
        ),
        processes=accelerator.num_processes,
        git_commit=git_commit(),
        wall_seconds=outcome.wall_seconds,
        resumes=outcome.resumes,
        skipped_steps=outcome.skipped_steps,
        decoders=outcome.decoders,
        merged_groups=outcome.merged_groups,
        class_weights=None if plan.balance.class_weights is None else plan.balance.class_weights.round(6).tolist(),
        unreadable_images=outcome.unreadable,
    )


def _model_facts(plan: Plan, model: torch.nn.Module, weights_sha256: str) -> ModelFacts:
    architecture, model_args = portable_architecture(plan.source)
    variant = variant_of(plan.source)
    return ModelFacts(
        requested=public_model(plan.config.model),
        architecture=architecture,
        model_args=model_args,
        needs_plugin=needs_plugin(architecture),
        parameters=sum(p.numel() for p in model.parameters()),
        variant=variant.name if variant else None,
        template=variant.template if variant else None,
        input={k: list(v) if isinstance(v, tuple) else v for k, v in plan.input.to_timm().items()},
        weights_sha256=weights_sha256,
    )


def _dataset_facts(plan: Plan, outcome: Outcome) -> DatasetFacts:
    splits, classes = plan.splits, len(plan.splits.label_names)
    return DatasetFacts(
        id=splits.dataset_id,
        hub_id=splits.hub_id,
        revision=splits.revision,
        fingerprint=splits.fingerprint,
        train_split=splits.found.train_split or "train",
        eval_split=splits.found.eval_split,
        train_count=splits.train.count,
        test_split=splits.stored_in("test"),
        eval_count=outcome.final.evaluation.total,
        test_count=0 if outcome.final.test is None else outcome.final.test.total,
        train_counts=class_counts(splits.train, classes),
        eval_counts=class_counts(splits.eval, classes),
        test_counts=None if splits.test is None else class_counts(splits.test, classes),
    )


def _kept_of_card(folder: RunFolder) -> Kept | None:
    """Return the parts of the existing card that its owner wrote, for the new card.

    A card that cannot be parsed, or whose generated parts were edited, is copied to the run folder.
    """
    path = folder.model / "README.md"
    if not path.is_file():
        return None
    try:
        card = take_apart(read_regular(path, CARD_BYTES).decode(), TAGS)
    except ValueError:
        card = None
    if card is None or card.foreign:
        previous = _free_name(folder.path, "README.previous", ".md")
        write_atomic(previous, read_regular(path, CARD_BYTES))
        _logger.warning(
            "the generated part of %s was edited, or written by another version; the old file is kept as %s in the "
            "run folder",
            printable(path),
            previous.name,
        )
        return card.kept if card and card.marked else None
    return card.kept


def _move_foreign_files(results: Path, stem: Path, own: set[str]) -> None:
    """Move files that a run does not write out of a folder of results that is about to be replaced.

    Args:
        results: The folder.
        stem: Path of the destination, without its suffix `.previous`.
        own: Names of the files that a run writes.
    """
    if results.is_symlink() or not results.is_dir():  # replacing a link does not touch its target
        return
    others = [path for path in results.iterdir() if path.name not in own]
    if not others:
        return
    previous = _free_name(stem.parent, f"{stem.name}.previous", "")
    previous.mkdir()
    for path in others:
        os.rename(path, previous / path.name)
    _logger.warning(
        "%s is replaced; other files in it were moved to %s: %s",
        printable(results),
        previous.name,
        listing(sorted(path.name for path in others)),
    )


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    """Return the first free path among `stem`, `stem-2`, `stem-3` and so on."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (folder / f"{stem}{number}{suffix}" for number in numbers)
    return next(path for path in paths if not os.path.lexists(path))


@torch.inference_mode()
def _sample(plan: Plan, model: torch.nn.Module) -> SampleFacts:
    """Return the model output for the first readable evaluation image."""
    names = plan.splits.label_names
    device = next(model.parameters()).device
    samples = evaluation_samples(plan.splits.eval, plan.input, plan.config.loader.max_image_pixels)
    with contextlib.closing(samples.batches(1, process=0, processes=1, workers=0, pin_memory=False)) as batches:
        batch = next(batch for batch in batches if not batch.unreadable)
    images = batch.images.to(device).contiguous(memory_format=torch.channels_last)
    logits, own = model(images).float(), batch.labels[0]
    several = own.ndim == 1
    scores = logits.sigmoid() if several else logits.softmax(dim=1)
    probabilities, classes = scores[0].cpu().topk(min(3, len(names)))
    return SampleFacts(
        index=int(batch.indices[0]),
        label=[names[int(i)] for i in own.nonzero()] if several else names[int(own)],
        output=[(names[int(i)], round(float(value), 4)) for i, value in zip(classes, probabilities, strict=True)],
    )


def _base_model(source: ModelSource) -> BaseModelFacts | None:
    if source.base_id is None:
        return None
    hub = not source.requested.startswith("local-dir:")
    stated: Any = source.base_license  # from a config.json, so it can be anything
    parts = stated if isinstance(stated, list) else [stated] if stated else []
    return BaseModelFacts(
        id=source.base_id,
        hub_id=source.base_id.partition("@")[0] if hub else None,
        license=", ".join(printable(part) for part in parts) or None,
    )


def _command(plan: Plan) -> str:
    """Return the command of the run, with local paths reduced to names."""
    words = ["accelerate", "launch", "scripts/train.py"]
    if plan.recipe and plan.recipe != QUICKSTART:
        words += ["--recipe", plan.recipe]
    public = public_settings(plan.config, plan.splits)
    for name, value in plan.asked.items():
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(name).replace("--", "--no-", 1))
            continue
        value = public[name] if name in ("dataset", "model", "exclude", "class_weights") else value
        words += [flag_of(name), *(str(v) for v in (value if isinstance(value, (list, tuple)) else [value]))]
    return printable(shlex.join(words))
