"""The job in order: train, export, plot, write the card and the record. The one place that knows all sides."""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError

import resnext_hub
from resnext_hub.agreement import Peers, lost_peers
from resnext_hub.data.columns import listing
from resnext_hub.data.dataset import DataConfig, Pictures, Splits, StreamedPictures, load_splits
from resnext_hub.errors import RequestError, RunError, StoppedRun, one_line
from resnext_hub.files import new_folder, read_regular, remove_leftovers, write_atomic
from resnext_hub.heartbeat import heartbeat
from resnext_hub.hub.card import TAGS, render_card
from resnext_hub.hub.card_file import Kept, take_apart
from resnext_hub.hub.checkpoints import CheckpointPusher, restore_run
from resnext_hub.hub.export import write_model
from resnext_hub.hub.publish import CARD_BYTES, Publication, open_repository, publish, require_config
from resnext_hub.inference.export import CALIBRATION_PICTURES, Int8
from resnext_hub.inference.trained import TrainedModel, load_trained
from resnext_hub.machine import (
    build_accelerator,
    device_type,
    git_commit,
    keep_memory,
    processes,
    processor_name,
    resolve_precision,
    set_threads,
    versions,
)
from resnext_hub.models.saved import CONFIG, WEIGHTS
from resnext_hub.models.source import ModelSource, build_model, needs_plugin, portable_architecture, variant_of
from resnext_hub.plan import Plan, folder_state, public_model, public_settings, read_config
from resnext_hub.plots import write_plots, write_samples
from resnext_hub.recipes import QUICKSTART
from resnext_hub.record import (
    PLOTS,
    BaseModelFacts,
    DatasetFacts,
    EvaluationFacts,
    HardwareFacts,
    ModelFacts,
    RunRecord,
    SampleFacts,
)
from resnext_hub.settings import flag_of
from resnext_hub.text import is_printable, printable
from resnext_hub.training.checkpoint import RunLock, latest_checkpoint
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.evaluate import Evaluation, evaluate
from resnext_hub.training.feed import evaluation_samples, require_readable
from resnext_hub.training.loop import train
from resnext_hub.training.schedule import plan_schedule
from resnext_hub.training.state import Outcome

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)

_DEFAULTS = TrainConfig().to_flat()

PUSH_GRACE = 20
"""Seconds that a run stopped by SIGTERM waits for its last checkpoint to reach the Hub; launchers give it 30."""

RECORD = "record.json"
PREVIOUS_RECORD = "record.previous.json"
"""The record of a finished run that goes on; nothing reads it."""

MODEL_FILES = {"README.md", CONFIG, WEIGHTS, "plots"}
SAMPLES = "samples.png"

TOP5_CLASSES = 20
"""Classes above which five guesses are worth a figure: of 20 a quarter are right by chance."""


def execute(plan: Plan, peers: Peers) -> RunRecord:
    """Train, and leave the whole run folder on the main process's disk; return the record in every process.

    Args:
        plan: The request, the same in every process.
        peers: The processes of the run.

    Raises:
        RequestError: If another process works on the folder.
        RunError: If training or the export fails.
        StoppedRun: If SIGTERM asked for it; the state was saved.
    """
    config, folder = plan.config, plan.folder
    require_readable(evaluation_samples(plan.splits.eval, plan.data_config, config.loader.max_image_pixels))
    precision = resolve_precision(config.mixed_precision, device_type())
    deterministic = bool(config.deterministic)
    accelerator = build_accelerator(precision, deterministic)
    set_threads(config.threads, accelerator.device.type)
    keep_memory(accelerator.device.type)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, CUDA's matrix products are refused
    torch.use_deterministic_algorithms(deterministic)
    # filling fresh memory would cost time, and nothing here reads it before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic

    with contextlib.ExitStack() as stack:
        peers.from_main(lambda: _take_folder(plan, stack))
        _log_plan(plan, accelerator, precision)

        torch.manual_seed(config.seed)
        network = peers.together(
            lambda: build_model(plan.source, plan.splits.label_names, config.drop_rate, config.drop_path)
        )
        if peers.size > 1:  # weights to start from, which another host may have in another version
            network.load_state_dict(peers.share_tensors(network.state_dict))
        with heartbeat(peers), lost_peers(peers.rank, peers.size), _pushed_checkpoints(plan) as on_checkpoint:
            outcome = train(
                config, plan.splits, network, plan.data_config, folder, accelerator, precision, peers, on_checkpoint
            )
        record = peers.from_main(lambda: _write_results(plan, outcome, accelerator, precision))
    accelerator.end_training()
    return record


def _take_folder(plan: Plan, stack: contextlib.ExitStack) -> None:
    """Lock the run folder, and write into it what the run begins with.

    Raises:
        RequestError: If another process works on the folder, or has done so since the plan was made.
        RunError: If the Hub refuses, or a fetched state cannot be gone on from.
    """
    config, folder = plan.config, plan.folder
    _make_folder(folder)
    require_places(folder)
    stack.enter_context(RunLock(folder))
    remove_leftovers(folder)
    if folder_state(folder) != plan.seen:
        raise RequestError(
            f"another command has worked in {printable(folder)} since this one looked at it; type this one again"
        )
    if config.publish.repo_id and (config.publish.push_to_hub or config.publish.push_checkpoints):
        open_repository(config.publish.repo_id, config.publish.private)
    # a finished run that grows: from here on, its record says nothing of what the folder will hold
    if os.path.lexists(folder / RECORD):
        os.replace(folder / RECORD, folder / PREVIOUS_RECORD)
    write_atomic(folder / "config.yaml", _yaml(config.to_flat()))
    if plan.resume_from is not None and latest_checkpoint(folder / "checkpoints") is None:
        restore_run(plan.resume_from, folder)
        if latest_checkpoint(folder / "checkpoints") is None:
            raise RunError("the checkpoint that was fetched is damaged, so there is nothing to go on from")


def require_places(folder: Path) -> None:
    """Raise RequestError if something else lies where results will go, which would show after training.

    A link would lead the writing to a file elsewhere. Most files are written aside and replace what was there, links
    too; those that are written in place may be no links.
    """
    for name in ("model", "plots", "checkpoints"):
        path = folder / name
        replaceable = path.is_symlink() and name != "checkpoints"
        if os.path.lexists(path) and not path.is_dir() and not replaceable:
            raise RequestError(f"{printable(path)} is not a folder; remove it, or give another --output-dir")
    replaced = [folder / name for name in ("config.yaml", "metrics.jsonl", "predictions.parquet", PREVIOUS_RECORD)]
    in_place = [folder / ".lock", *sorted(folder.glob("unreadable-*.jsonl"))]
    for path in (*replaced, *in_place):
        if path.is_symlink() and path in replaced:
            continue
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise RequestError(f"{printable(path)} is not a regular file; remove it, or give another --output-dir")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"the run folder {printable(folder)} cannot be made: {error.strerror or one_line(error)}; give another "
            "--output-dir"
        ) from error


def publish_run(plan: Plan, record: RunRecord) -> Publication:
    """Publish a finished run as its configuration says.

    Raises:
        RunError: If that fails; the run itself is kept.
    """
    hub = plan.config.publish
    return publish(plan.folder / "model", record, hub.repo_id, hub.license, private=hub.private)


@contextlib.contextmanager
def _pushed_checkpoints(plan: Plan) -> Iterator[Callable[[Path], None]]:
    """Give what takes each checkpoint to the Hub, if that is asked for, and see the last one through."""
    hub = plan.config.publish
    if not (hub.push_checkpoints and hub.repo_id):
        yield lambda path: None
        return
    pusher = CheckpointPusher(hub.repo_id, hub.private, _yaml(public_settings(plan.config, plan.splits)))
    try:
        yield pusher.push
    except StoppedRun:
        pusher.finish(PUSH_GRACE)
        raise
    pusher.finish()


def _yaml(settings: Mapping[str, Any]) -> str:
    text = str(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    if not is_printable(text.replace("\n", "")):  # escapes are all or none
        text = str(yaml.safe_dump(dict(settings), sort_keys=False))
    return text


def evaluate_run(folder: Path, threads: str = "auto") -> tuple[Evaluation, RunRecord]:
    """Evaluate a run's published model folder as it was evaluated in the run; give that and the run's record.

    Raises:
        RequestError: If the folder holds no finished run, or its dataset is not where it was.
    """
    record = RunRecord.load(folder / RECORD)
    settings = read_config(folder)
    if not settings:
        raise RequestError(f"there is no config.yaml in {printable(folder)}, which says what to evaluate on")
    require_config(folder / "model", record)
    config = TrainConfig.from_flat(settings)
    splits = load_splits(config.data)
    if splits.fingerprint != record.dataset.fingerprint:
        raise RequestError(
            f"{config.data.dataset} has changed since the run: its fingerprint is {splits.fingerprint[:16]}, "
            f"recorded is {record.dataset.fingerprint[:16]}"
        )
    device = torch.device(device_type())
    set_threads(threads, device.type)
    model = load_trained(f"local-dir:{folder / 'model'}")
    evaluation = evaluate(
        model.network.to(device).to(memory_format=torch.channels_last),
        evaluation_samples(splits.eval, model.data_config, config.loader.max_image_pixels),
        batch_size=record.evaluation.batch_size,
        device=device,
    )
    return evaluation, record


def prepare_int8(model: TrainedModel, dataset: str | None, max_drop: float) -> Int8:
    """Read the pictures that int8 is calibrated on and judged by.

    Args:
        model: The network.
        dataset: A dataset as for training, of the network's classes; if not given, that of the run whose model it is.
        max_drop: Points of top-1 accuracy that may be lost.

    Raises:
        RequestError: If there is no dataset, or it has other classes.
    """
    settings = read_config(model.folder.parent) if model.folder is not None else {}
    if dataset is not None:
        data = DataConfig(dataset=dataset)
    elif settings:
        data = TrainConfig.from_flat(settings).data
    else:
        raise RequestError("--int8 needs --calibration, a dataset to calibrate on and to measure its accuracy by")
    splits = load_splits(data)
    if splits.label_names != model.label_names:
        raise RequestError(
            f"--calibration {data.dataset} has the classes {listing(splits.label_names)}; expected the network's, "
            f"{listing(model.label_names)}"
        )
    train = splits.train
    if isinstance(train, Pictures):  # some from everywhere, as a folder's come class by class
        some = np.linspace(0, len(train) - 1, min(CALIBRATION_PICTURES, len(train))).round().astype(int)
        train = dataclasses.replace(train, indices=train.indices[some], labels=train.labels[some])
    pictures, batches = 0, []
    for batch in evaluation_samples(train, model.data_config).batches(25, 0, 1, 0, False):
        unreadable = torch.tensor([entry.index for entry in batch.unreadable], dtype=torch.int64)
        batches.append(batch.images[~torch.isin(batch.indices, unreadable)])
        pictures += len(batches[-1])
        if pictures >= CALIBRATION_PICTURES:
            break
    if pictures == 0:
        raise RequestError(f"none of the images of {printable(data.dataset)} can be read to calibrate on")
    return Int8(
        calibration=torch.cat(batches)[:CALIBRATION_PICTURES],
        samples=evaluation_samples(splits.eval, model.data_config),
        max_drop=max_drop,
    )


def _log_plan(plan: Plan, accelerator: "Accelerator", precision: str) -> None:
    config, splits = plan.config, plan.splits
    schedule = plan_schedule(config, splits.train.count)
    part = config.batch_size // accelerator.num_processes
    _logger.info("run folder: %s", plan.folder)
    if plan.source.pretrained:
        _logger.info("classifier: %s", plan.source.saved.classifier_for(splits.label_names))
    _logger.info("settings: %s", " ".join(f"{k}={printable(v)}" for k, v in config.to_flat().items() if v is not None))
    _logger.info(
        "%s: %s images to train on, %s to evaluate on (%s), %d classes",
        splits.dataset_id,
        _count(splits.train),
        _count(splits.eval),
        _origin(splits),
        len(splits.label_names),
    )
    _logger.info(
        "%d steps of %d pictures: %d process(es) x %d, %d at once; %s, %s, %d thread(s)",
        schedule.steps,
        config.batch_size,
        accelerator.num_processes,
        part,
        min(config.micro_batch_size or part, part),
        accelerator.device.type,
        {"no": "float32"}.get(precision, precision),
        torch.get_num_threads(),
    )
    _log_doubts(config, splits)


def _log_doubts(config: TrainConfig, splits: Splits) -> None:
    """Warn of what can be done and is likely not meant."""
    count, size = splits.train.count, config.batch_size
    steps = plan_schedule(config, count).steps
    fitting = _fitting_batch(count, config.epochs)
    if count is not None and count < size:
        _logger.warning(
            "--batch-size %d is larger than the training split (%d images), so a step repeats images; "
            "--batch-size %d makes %d steps an epoch",
            size,
            count,
            fitting,
            math.ceil(count / fitting),
        )
    elif steps < 20 and config.max_steps is None:
        _logger.warning(
            "only %d steps: --batch-size %d or --epochs %g give more", steps, fitting, config.epochs * 20 / steps
        )
    policy = config.transform.auto_augment
    if config.transform.color_jitter and policy is not None and "3a" not in policy:
        _logger.warning(
            "--color-jitter %g is off, as timm leaves it out with --auto-augment %s",
            config.transform.color_jitter,
            policy,
        )
    if isinstance(splits.eval, Pictures):
        counts = _class_counts(splits.eval, len(splits.label_names)) or []
        empty = [name for name, count in zip(splits.label_names, counts, strict=True) if count == 0]
        if empty:
            _logger.warning("no picture to evaluate on is of the class %s", listing(empty))


def _fitting_batch(count: int | None, epochs: float) -> int:
    """Return a global batch, a power of two for each process, of which an epoch has 4 steps and a run 20, if it can."""
    images = min((count or 1) / 4, (count or 1) * epochs / 20)
    part = images / processes()
    return processes() * (1 << int(math.log2(part)) if part >= 2 else 2)


def _write_results(plan: Plan, outcome: Outcome, accelerator: "Accelerator", precision: str) -> RunRecord:
    """Write model folder, plots, card and record; return the record.

    Raises:
        RunError: If the disk does not take them, or the exported model is not the trained one.
    """
    try:
        _write_files(plan, outcome, accelerator, precision)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the results could not be written to {printable(plan.folder)}: {one_line(error)}; training is done and "
            "kept: rerun the same command to write them"
        ) from error
    return RunRecord.load(plan.folder / RECORD)


def _write_files(plan: Plan, outcome: Outcome, accelerator: "Accelerator", precision: str) -> None:
    """Write model folder, plots, card and record.

    The model folder is replaced whole, card and all; the record comes last and marks the run as done.
    """
    folder, splits, evaluation = plan.folder, plan.splits, outcome.evaluation
    kept = _kept_of_card(folder)
    _keep_others(folder / "model" / "plots", folder / "model.plots", set(PLOTS))
    _keep_others(folder / "model", folder / "model", MODEL_FILES)
    _keep_others(folder / "plots", folder / "plots", {*PLOTS, SAMPLES})
    with new_folder(folder / "model") as model:
        digest = _write_model(plan, outcome.network, model)
        record = _record_of(plan, outcome, accelerator, precision, digest)
        _write_predictions(evaluation, folder / "predictions.parquet")
        with new_folder(folder / "plots") as aside:
            record = dataclasses.replace(record, plots=write_plots(record, aside))
            if isinstance(splits.eval, Pictures):  # on this disk alone: whose images they are is not ours to publish
                most = plan.config.loader.max_image_pixels
                write_samples(splits.eval, evaluation, splits.label_names, aside / SAMPLES, most)
        (model / "plots").mkdir()
        for name in record.plots:
            shutil.copyfile(folder / "plots" / name, model / "plots" / name)
        write_atomic(model / "README.md", render_card(record, kept=kept))
    unmeasured = [name for name, count in zip(record.label_names, record.evaluation.measured, strict=True) if not count]
    if unmeasured:
        _logger.warning("not measured, as no evaluation image shows them: %s", listing(unmeasured, 20))
    record.save(folder / RECORD)


def _write_model(plan: Plan, network: torch.nn.Module, folder: Path) -> str:
    """Write weights and config.json; return the SHA-256 of the weights."""
    architecture, model_args = portable_architecture(plan.source)
    variant = variant_of(plan.source)
    return write_model(
        network,
        folder,
        architecture=architecture,
        model_args=model_args,
        input_facts=plan.data_config,
        label_names=plan.splits.label_names,
        license=None,
        plugin_facts={
            "version": resnext_hub.__version__,
            "variant": variant.name if variant else None,
            "cardinality": variant.cardinality if variant else None,
            "base_width": variant.base_width if variant else None,
        },
    )


def _record_of(
    plan: Plan, outcome: Outcome, accelerator: "Accelerator", precision: str, weights_sha256: str
) -> RunRecord:
    """Return every fact about a run that is done."""
    config, folder, splits, source = plan.config, plan.folder, plan.splits, plan.source
    evaluation = outcome.evaluation
    architecture, model_args = portable_architecture(source)
    variant = variant_of(source)
    return RunRecord(
        name=printable(folder.resolve().name),
        config=public_settings(config, splits),
        changed=[name for name, value in config.to_flat().items() if value != _DEFAULTS[name]],
        command=_command(plan),
        model=ModelFacts(
            requested=public_model(config.model),
            architecture=architecture,
            model_args=model_args,
            needs_plugin=needs_plugin(architecture),
            parameters=sum(p.numel() for p in outcome.network.parameters()),
            variant=variant.name if variant else None,
            template=variant.template if variant else None,
            input={k: list(v) if isinstance(v, tuple) else v for k, v in plan.data_config.items()},
            weights_sha256=weights_sha256,
        ),
        base_model=_base_model(source),
        dataset=DatasetFacts(
            id=splits.dataset_id,
            hub_id=splits.hub_id,
            revision=splits.revision,
            fingerprint=splits.fingerprint,
            train_split=splits.found.train_split or "train",
            eval_split=splits.found.eval_split,
            train_count=splits.train.count,
            eval_count=evaluation.total,
            train_counts=_class_counts(splits.train, len(splits.label_names)),
            eval_counts=_class_counts(splits.eval, len(splits.label_names)),
        ),
        label_names=list(splits.label_names),
        steps=outcome.steps,
        epochs=outcome.epochs,
        evaluation=EvaluationFacts(
            step=outcome.step,
            epoch=outcome.epoch,
            correct=evaluation.correct,
            count=evaluation.count,
            top1=evaluation.top1,
            loss=evaluation.loss,
            top5=evaluation.top5 if len(splits.label_names) > TOP5_CLASSES else None,
            macro_f1=evaluation.macro_f1,
            calibration_error=evaluation.calibration_error,
            batch_size=config.eval_batch_size,
            confusion=evaluation.confusion(len(splits.label_names)),
        ),
        sample=_sample(outcome.network, splits, plan.data_config, config.loader.max_image_pixels),
        history=outcome.history,
        versions=versions(),
        hardware=HardwareFacts(
            device=accelerator.device.type,
            name=processor_name(accelerator.device),
            threads=torch.get_num_threads(),
            mixed_precision=precision,  # type: ignore[arg-type]
        ),
        processes=accelerator.num_processes,
        git_commit=git_commit(),
        wall_seconds=outcome.wall_seconds,
        resumes=outcome.resumes,
        skipped_steps=outcome.skipped_steps,
        decoders=outcome.decoders,
        merged_groups=outcome.merged_groups,
        broken_pictures=outcome.unreadable,
    )


def _kept_of_card(folder: Path) -> Kept | None:
    """Return what the owner wrote into the card of a model folder that is about to be replaced.

    A card of which that cannot be told is copied to the run folder.
    """
    path = folder / "model" / "README.md"
    if not path.is_file():
        return None
    try:
        card = take_apart(read_regular(path, CARD_BYTES).decode(), TAGS)
    except ValueError:
        card = None
    if card is None or card.foreign:
        previous = _free_name(folder, "README.previous", ".md")
        write_atomic(previous, read_regular(path, CARD_BYTES))
        _logger.warning(
            "%s was edited where the tool writes, or by another version of it: it is kept as %s in the run folder",
            printable(path),
            previous.name,
        )
        return card.kept if card and card.marked else None
    return card.kept


def _keep_others(results: Path, stem: Path, own: set[str]) -> None:
    """Move files that are not the tool's out of a folder of results that is about to be replaced.

    Args:
        results: The folder.
        stem: Path to which `.previous` is added, for where they go.
        own: Names of the tool's files in the folder.
    """
    if results.is_symlink() or not results.is_dir():  # only the link is replaced, and nothing behind it is lost
        return
    others = [path for path in results.iterdir() if path.name not in own]
    if not others:
        return
    previous = _free_name(stem.parent, f"{stem.name}.previous", "")
    previous.mkdir()
    for path in others:
        os.rename(path, previous / path.name)
    _logger.warning(
        "%s is written anew; moved to %s, as they are not part of it: %s",
        printable(results),
        previous.name,
        listing(sorted(path.name for path in others)),
    )


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    """Return the first path of a name, numbered from the second on, that nothing lies at."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (folder / f"{stem}{number}{suffix}" for number in numbers)
    return next(path for path in paths if not os.path.lexists(path))


@torch.inference_mode()
def _sample(network: torch.nn.Module, splits: Splits, data_config: dict[str, Any], max_pixels: int) -> SampleFacts:
    """Give what a network says of the first evaluation sample that can be read."""
    device = next(network.parameters()).device
    samples = evaluation_samples(splits.eval, data_config, max_pixels)
    with contextlib.closing(samples.batches(1, process=0, processes=1, workers=0, pin_memory=False)) as batches:
        batch = next(batch for batch in batches if not batch.unreadable)
    images = batch.images.to(device).contiguous(memory_format=torch.channels_last)
    probabilities, classes = network(images).float().softmax(dim=1)[0].cpu().topk(min(3, len(splits.label_names)))
    names = [splits.label_names[int(i)] for i in classes]
    return SampleFacts(
        index=int(batch.indices[0]),
        label=splits.label_names[int(batch.labels[0])],
        output=[(name, round(float(value), 4)) for name, value in zip(names, probabilities, strict=True)],
    )


def _write_predictions(evaluation: Evaluation, path: Path) -> None:
    import io

    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "index": evaluation.indices,
            "label": evaluation.labels,
            "prediction": evaluation.predictions,
            "probability": evaluation.probabilities,
        }
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())


def _count(pictures: Pictures | StreamedPictures) -> str:
    stated = "an unknown number of" if pictures.count is None else str(pictures.count)
    return f"{stated} streamed" if isinstance(pictures, StreamedPictures) else stated


def _origin(splits: Splits) -> str:
    """Describe where the evaluation images come from."""
    if splits.found.eval_split is not None:
        return f"split {printable(splits.found.eval_split)}"
    train, held_out = splits.train.count or 0, splits.eval.count or 0
    return f"held out, {100 * held_out / max(train + held_out, 1):.0f} %"


def _class_counts(pictures: Pictures | StreamedPictures, classes: int) -> list[int] | None:
    if isinstance(pictures, StreamedPictures):
        return None
    return [int(n) for n in np.bincount(pictures.labels, minlength=classes)]


def _base_model(source: ModelSource) -> BaseModelFacts | None:
    if source.base_id is None:
        return None
    hub = not source.requested.startswith("local-dir:")
    stated: Any = source.base_license  # of a config.json that anybody may have written
    parts = stated if isinstance(stated, list) else [stated] if stated else []
    return BaseModelFacts(
        id=source.base_id,
        hub_id=source.base_id.partition("@")[0] if hub else None,
        license=", ".join(printable(part) for part in parts) or None,
    )


def _command(plan: Plan) -> str:
    """Give the command that was asked for, with local paths reduced to their names."""
    words = ["accelerate", "launch", "scripts/train.py"]
    if plan.recipe and plan.recipe != QUICKSTART:
        words += ["--recipe", plan.recipe]
    public = public_settings(plan.config, plan.splits)
    for name, value in plan.asked.items():
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(name).replace("--", "--no-", 1))
            continue
        value = public[name] if name in ("dataset", "model") else value
        words += [flag_of(name), *(str(v) for v in (value if isinstance(value, (list, tuple)) else [value]))]
    return printable(shlex.join(words))
