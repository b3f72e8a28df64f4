"""From what somebody asks for to a run that was found right, or one line that says what is wrong.

Everything here happens in every process, except that the main one alone looks at the run folder. Nothing is computed.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnext_hub.agreement import Peers
from resnext_hub.data.columns import listing
from resnext_hub.data.dataset import Splits, check_source, load_splits
from resnext_hub.data.jpeg import is_installed
from resnext_hub.data.loaders import PICTURE_MODES, derive_workers
from resnext_hub.data.sources import dataset_name
from resnext_hub.data.transforms import published_input
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import read_yaml, sha256_of
from resnext_hub.hub.export import build_config
from resnext_hub.hub.publish import check_request, require_model
from resnext_hub.machine import (
    check_launcher,
    device_type,
    local_processes,
    processes,
    resolve_precision,
    source_digest,
    versions,
)
from resnext_hub.models.saved import check_saving, without_values
from resnext_hub.models.saved_config import MAX_RESIZED, resized_side
from resnext_hub.models.source import ModelSource, find_model, local_name, portable_architecture
from resnext_hub.recipes import QUICKSTART, RECIPES
from resnext_hub.record import RunRecord
from resnext_hub.settings import did_you_mean, flag_of, shown
from resnext_hub.text import printable
from resnext_hub.training.config import GROWING_FIELDS, MACHINE_FIELDS, PROCESS_FIELDS, TrainConfig
from resnext_hub.training.optim import check_optimizer, derive_lr
from resnext_hub.training.schedule import plan_schedule, sizes_of

_logger = logging.getLogger(__name__)

RUNS = Path("runs")

MODEL_FOLDER_BYTES = 4_000_000
"""Room for plots, card, record and predictions of a small run."""

_LAST_SETTING = "private"
"""The setting that a run's config.yaml has ended with since the first release; without it, the file was cut off."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request that was found right."""

    config: TrainConfig
    """Resolved: no open field is left."""
    asked: dict[str, Any]
    """The settings that were asked for, over the recipe's and the defaults."""
    recipe: str | None
    folder: Path
    source: ModelSource
    splits: Splits
    data_config: dict[str, Any]
    finished: bool
    """Whether the folder holds this very run, done."""
    resume_from: Path | None
    """A state from elsewhere to go on from, if the folder holds no checkpoints."""
    seen: tuple[str | None, ...]
    """What the folder held when it was looked at, as `folder_state` has it."""


@dataclass(frozen=True, kw_only=True)
class FolderState:
    """What a run folder holds. On several hosts, only the main process's one needs it."""

    settings: dict[str, Any]
    """The run's configuration; empty if there is no run."""
    steps: int | None = None
    """Steps of the run, if it is finished."""
    fingerprint: str | None = None
    """The dataset of the run, if it is finished."""
    seen: tuple[str | None, ...] = ()
    """Digests of its files, as `folder_state` has them."""
    fault: str | None = None
    """Why the model folder does not hold the model of the record, if it does not."""


def merge_settings(
    asked: Mapping[str, Any],
    recipe: str | None = None,
    file: Path | None = None,
    fetched: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str | None]:
    """Lay settings over each other: recipe, then file, then what was asked for; give them and the recipe's name.

    Where no dataset is named at all, the recipe is quickstart.

    Raises:
        RequestError: If there is no such recipe or file, or the file is no mapping.
    """
    from_file: dict[str, Any] = dict(fetched or {})
    if file is not None:
        try:
            from_file = read_yaml(file, "expected a file of settings, one `name: value` a line")
        except RequestError as error:
            raise RequestError(f"--config {error}") from error
    if recipe is None and not {"dataset"} & (from_file.keys() | asked.keys()):
        recipe = QUICKSTART
    if recipe is not None and recipe not in RECIPES:
        hint = did_you_mean(recipe, RECIPES)
        raise RequestError(f"--recipe {shown(recipe)}: there is no such recipe, but {', '.join(RECIPES)}{hint}")
    return {**(RECIPES[recipe] if recipe else {}), **from_file, **asked}, recipe


def prepare(
    settings: Mapping[str, Any],
    *,
    asked: Mapping[str, Any],
    recipe: str | None = None,
    output_dir: Path | None = None,
    resume: bool | None = None,
    resume_from: Path | None = None,
    peers: Peers | None = None,
) -> Plan:
    """Check a request and fill in what it leaves open, without computing anything.

    Args:
        settings: Flat settings, merged.
        asked: Those of them that were asked for, for the command in the record.
        recipe: Name of the recipe beneath them.
        output_dir: The run folder; `runs/{dataset}-{model}` if not given.
        resume: Whether to go on with a run that the folder holds; None goes on if it holds one, and a folder in use is
            refused if not.
        resume_from: The state of a run, fetched from elsewhere, to go on from if the folder holds none.
        peers: The processes of the run, of which the main one alone looks into the run folder; this one if not given.

    Raises:
        RequestError: If the request is wrong.
        RunError: If the Hub is needed and cannot be reached.
    """
    check_launcher()
    config = TrainConfig.from_flat(settings)
    _check_batch(config)
    _check_pairs(config)
    if config.publish.repo_id is not None:
        check_request(None, config.publish.repo_id, config.publish.license or "other")
    device = device_type()
    resolve_precision(config.mixed_precision, device)

    check_source(config.data)
    source = find_model(config.model, config.pretrained)
    folder = output_dir or RUNS / f"{_slug(dataset_name(config.data))}-{_slug(_model_name(source))}"
    peers = peers or Peers()
    state = peers.from_main(lambda: _look_into(folder))
    before = state.settings
    if resume and not before:
        _logger.warning("--resume: %s holds no run, so this one starts at step 0", printable(folder))
    if before and config.data.dataset_revision is None and before.get("dataset") == config.data.dataset:
        # a run goes on with the commit that it began with, even if the dataset has moved since
        config = _replace_data(config, dataset_revision=before.get("dataset_revision"))
    if resume is False and before:
        raise RequestError(f"--no-resume: {folder} holds a run already; give another --output-dir, or remove it")

    config = _choose_decoder(config, folder, before or (read_config(resume_from) if resume_from else {}), asked)
    splits = load_splits(config.data)
    data_config = published_input(config.transform, source.pretrained_cfg)
    _check_input(config, data_config)
    config = _resolve(config, source, splits, data_config, device)
    check_optimizer(config.optim, device)
    plan_schedule(config, splits.train.count)
    needed = _check_network(config, source, splits, data_config)

    def check_folder() -> bool:
        finished = _is_finished(folder, state, resume_from, config, splits)
        if not finished:
            _check_space(folder, needed)
        return finished

    # the main process's paths are compared with those of before: another host may have the dataset elsewhere
    finished = peers.from_main(check_folder)
    if config.loader.decoder == "simplejpeg" and not finished and not is_installed():
        raise RequestError(
            f"{folder if before else '--decoder simplejpeg'} needs simplejpeg, which is not installed: "
            'pip install "resnext-hub[train]", or --decoder pil, whose pixels differ a little'
        )
    return Plan(
        config=config,
        asked=dict(asked),
        recipe=recipe,
        folder=folder,
        source=source,
        splits=splits,
        data_config=data_config,
        finished=finished,
        resume_from=resume_from,
        seen=state.seen,
    )


def public_settings(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """Give the settings of a run without paths of this machine: nothing published holds one."""
    return config.to_flat() | {"dataset": printable(splits.dataset_id), "model": public_model(config.model)}


def public_model(requested: str) -> str:
    """Return what was asked for without the place of a local model."""
    kind, _, place = requested.partition(":")
    return f"local-dir:{local_name(Path(place))}" if kind == "local-dir" else printable(requested)


def folder_state(folder: Path) -> tuple[str | None, ...]:
    """Return digests of the settings and the record that a folder holds, to see whether another command has been there.

    The record of an unfinished run is not there.
    """
    paths = (folder / "config.yaml", folder / "record.json")
    return tuple(sha256_of(path) if path.is_file() else None for path in paths)


def shared_facts(plan: Plan) -> dict[str, object]:
    """Return what has to be the same in every process of a run, by the name that a message calls it.

    A local dataset or model may lie elsewhere on another host: the dataset is compared by its content, and the main
    process's weights are sent to all.
    """
    config, splits = plan.config, plan.splits
    own = set(PROCESS_FIELDS)
    if splits.hub_id is None:
        own.add("dataset")
    if config.model.startswith("local-dir:"):
        own.add("model")
    settings = {flag_of(name): value for name, value in config.to_flat().items() if name not in own}
    device = device_type()
    names = hashlib.sha256(json.dumps(splits.label_names).encode()).hexdigest()[:8]
    computing = versions()
    return settings | {
        "architecture": f"{plan.source.architecture} {plan.source.model_args or ''}".rstrip(),
        "class names": f"{listing(splits.label_names, 6)} ({len(splits.label_names)} in all, digest {names})",
        "training images": splits.train.count,
        "evaluation images": splits.eval.count,
        "dataset fingerprint": splits.fingerprint[:16],
        "device": device,
        "precision": resolve_precision(config.mixed_precision, device),
        "input": str(plan.data_config),
        "resnext-hub": f"{computing['resnext-hub']} (source {source_digest()[:8]})",
        **{name: computing.get(name) for name in ("torch", "timm", "numpy", "pillow", "simplejpeg")},
    }


def _look_into(folder: Path) -> FolderState:
    """Return what a run folder holds.

    Raises:
        RequestError: If it cannot be a run folder, or what it holds cannot be read.
    """
    _check_usable(folder)
    seen = folder_state(folder)
    settings = read_config(folder)
    path = folder / "record.json"
    if not (settings and os.path.lexists(path)):
        _check_rights(folder)
        return FolderState(settings=settings, seen=seen)
    record = RunRecord.load(path)
    fault = None
    try:
        require_model(folder / "model", record)
    except RequestError as error:
        fault = str(error)
    return FolderState(
        settings=settings, steps=record.steps, fingerprint=record.dataset.fingerprint, seen=seen, fault=fault
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that a folder holds, or none.

    Raises:
        RequestError: If the file is damaged.
    """
    path = folder / "config.yaml"
    if not os.path.lexists(path):
        return {}
    way_out = "put the file back as it was, or give another --output-dir"
    content = read_yaml(path, way_out)
    try:
        TrainConfig.from_flat(content)
    except RequestError as error:
        raise RequestError(f"{printable(path)} is damaged ({one_line(error)}); {way_out}") from error
    if _LAST_SETTING not in content:
        raise RequestError(f"{printable(path)} is damaged (it ends before its last setting); {way_out}")
    return content


def _check_batch(config: TrainConfig) -> None:
    count = processes()
    if config.batch_size % count:
        low = config.batch_size // count * count
        nearest = [str(size) for size in (low, low + count) if size]
        raise RequestError(
            f"--batch-size {config.batch_size} is the global batch, and {count} processes do not divide it; "
            f"nearest: {' or '.join(nearest)}"
        )


def _check_pairs(config: TrainConfig) -> None:
    part = config.batch_size // processes()
    if config.transform.mixes and part % 2:
        raise RequestError(
            f"--batch-size {config.batch_size} gives each process {part} pictures, but --mixup and --cutmix take them "
            f"in pairs; nearest: {' or '.join(str(n * processes()) for n in (part - 1, part + 1) if n)}"
        )


def _choose_decoder(
    config: TrainConfig, folder: Path, before: Mapping[str, Any], asked: Mapping[str, Any]
) -> TrainConfig:
    """Take the decoder that a run began with, else the fast one where it is installed; a flag goes over both.

    Raises:
        RequestError: If the run would go on with another one without being asked to by the flag.
    """
    own = before.get("decoder", "pil") if before else None
    decoder = config.loader.decoder
    if decoder == "auto":
        decoder = own or ("simplejpeg" if is_installed() else "pil")
    if own not in (None, decoder) and "decoder" not in asked:
        raise RequestError(
            f"{folder} was decoded with {own} and would go on with {decoder}, whose pixels differ a little; if that is "
            f"meant, type --decoder {decoder}"
        )
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, decoder=decoder))


def _replace_data(config: TrainConfig, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **values))


def _check_input(config: TrainConfig, data_config: Mapping[str, Any]) -> None:
    """Refuse images that the settings and the model's own pretrained_cfg, which fills their gaps, do not allow."""
    channels, height, width = data_config["input_size"]
    model = f"--model {printable(config.model)}"
    if channels not in PICTURE_MODES:
        raise RequestError(f"{model} takes {channels} channels; expected 1 or 3")
    if height != width:
        raise RequestError(
            f"{model} takes images of {height} x {width} pixels (height x width), and training makes square ones: give "
            f"--image-size, such as {max(height, width)}, or take another model"
        )
    crop_pct = data_config["crop_pct"]
    resized = resized_side(data_config["input_size"], crop_pct)
    if resized > MAX_RESIZED:
        raise RequestError(
            f"--image-size {width} with --crop-pct {crop_pct:g} resizes images to {resized:,} px for evaluation: "
            f"expected at most {MAX_RESIZED:,}; reduce --image-size or increase --crop-pct"
        )


def _resolve(
    config: TrainConfig, source: ModelSource, splits: Splits, data_config: Mapping[str, Any], device: str
) -> TrainConfig:
    """Fill in every open field with what follows from model, data and device."""
    optim, loader = config.optim, config.loader
    found = splits.found
    if splits.revision is not None:
        found = dataclasses.replace(found, dataset_revision=splits.revision)
    return dataclasses.replace(
        config,
        model=source.requested,
        pretrained=source.pretrained,
        deterministic=device == "cpu" if config.deterministic is None else config.deterministic,
        data=found,
        transform=dataclasses.replace(
            config.transform,
            image_size=data_config["input_size"][-1],
            crop_pct=data_config["crop_pct"],
            interpolation=data_config["interpolation"],
            mean=_three(data_config["mean"]),
            std=_three(data_config["std"]),
        ),
        loader=dataclasses.replace(
            loader,
            workers=derive_workers(device, local_processes()) if loader.workers is None else loader.workers,
        ),
        optim=dataclasses.replace(
            optim, lr=optim.lr or derive_lr(optim.optimizer, config.batch_size, source.pretrained)
        ),
    )


def _three(values: Any) -> tuple[float, float, float]:
    first, *rest = [float(value) for value in values]
    return (first, rest[0], rest[1]) if rest else (first, first, first)


def _check_network(config: TrainConfig, source: ModelSource, splits: Splits, data_config: Mapping[str, Any]) -> int:
    """Refuse images that the model does not take, and a batch norm over a single value; nothing is computed.

    Returns:
        Bytes of the weights in float32.
    """
    classes = len(splits.label_names)
    network = without_values(lambda: source.saved.build(classes, config.drop_rate, config.drop_path))
    full = data_config["input_size"][-1]
    size = config.progressive_size or full
    if size > full:
        raise RequestError(f"--progressive-size {size}: expected less than --image-size, which is {full}")
    steps = plan_schedule(config, splits.train.count).steps
    flag = "--progressive-size" if size < full else "--image-size"
    info: Any = getattr(network, "feature_info", None)
    reduction = max((stage["reduction"] for stage in info), default=1) if info else 1
    if size < reduction:
        raise RequestError(f"{flag} {size} is smaller than the stride of {config.model}, {reduction} pixels")
    for side in reversed(sizes_of(steps, config.progressive_size, full)):
        try:
            network.eval()(torch.empty(2, data_config["input_size"][0], side, side, device="meta"))
        except (AssertionError, RuntimeError) as error:
            if side == full and isinstance(error, RuntimeError):  # some networks cannot be run without values
                break
            what = f"--image-size {full}" if side == full else f"{side} px on the way from --progressive-size {size}"
            raise RequestError(f"--model {config.model} does not take {what}: {one_line(error)}") from error
    part = config.batch_size // processes()
    micro = config.micro_batch_size or part
    smallest = part % micro or min(micro, part)
    has_batch_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    if smallest == 1 and size <= reduction and has_batch_norm:
        raise RequestError(
            f"--batch-size {config.batch_size} leaves a pass of one picture of {size} px, over whose single last pixel "
            f"batch norm has nothing to average; take at least 2 pictures a pass, or {flag} {size + 1}"
        )
    architecture, model_args = portable_architecture(source)
    content = build_config(
        network,
        architecture=architecture,
        model_args=model_args,
        input_facts=data_config,
        label_names=splits.label_names,
        license=None,
        plugin_facts={},
    )
    # before the first step, as it would fail after the last one
    check_saving(f"--model {config.model}", content, network)
    return 4 * sum(parameter.numel() for parameter in network.parameters())


def _nearest(folder: Path) -> Path:
    """Return a folder, or the one above it that is there, in which it would be made."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))


def _check_rights(folder: Path) -> None:
    if not os.access(_nearest(folder), os.W_OK | os.X_OK):
        raise RequestError(
            f"the run folder {printable(folder)} is not writable: permission denied; choose another --output-dir"
        )


def _check_space(folder: Path, weight_bytes: int) -> None:
    """Refuse a folder that cannot be written, and a disk that has no room for a checkpoint and the model folder.

    A checkpoint holds the weights and what the optimizer keeps of each.
    """
    _check_rights(folder)
    need, (total, _, free) = 4 * weight_bytes + MODEL_FOLDER_BYTES, shutil.disk_usage(_nearest(folder))
    if total and free < need:  # some file systems state no size
        raise RequestError(
            f"the disk of {printable(folder)} has {free / 1e6:.0f} MB free, and a checkpoint with the model folder "
            f"takes {need / 1e6:.0f}; give another --output-dir, or make room"
        )


def _check_usable(folder: Path) -> None:
    """Refuse a run folder that could not be made or would be written into among other things; make nothing yet."""
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise RequestError(f"the run folder {folder} cannot be made, as {nearest} is a file; give another --output-dir")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".") if folder.is_dir() else []
    if others and not os.path.lexists(folder / "config.yaml"):
        raise RequestError(
            f"{folder} holds other files ({listing(others, 3)}) and no run, which would write among them; give an "
            "--output-dir of its own"
        )


def _is_finished(
    folder: Path, state: FolderState, resume_from: Path | None, config: TrainConfig, splits: Splits
) -> bool:
    """Return whether the folder holds this very run, done; refuse to go on with another one, there or fetched."""
    if state.settings:
        return _check_folder(folder, state, config.to_flat(), splits)
    if resume_from is not None:
        there, here = read_config(resume_from), public_settings(config, splits)
        if all(settings["model"].startswith("local-dir:") for settings in (there, here)):
            here["model"] = there["model"]  # which lies elsewhere on another machine; its tensors are compared
        _check_folder(folder, FolderState(settings=there), here, splits)
    return False


def _check_folder(folder: Path, state: FolderState, now: Mapping[str, Any], splits: Splits) -> bool:
    """Compare a request with the run that a folder holds; say whether that run is done.

    Raises:
        RequestError: If the run in the folder is another one; the settings that differ are named.
    """
    before = state.settings
    fixed = [name for name in now if name not in MACHINE_FIELDS | GROWING_FIELDS]
    differing = [
        f"{flag_of(name)} {before.get(name)} there, {now[name]} now" for name in fixed if before.get(name) != now[name]
    ]
    count = splits.train.count
    old_steps = plan_schedule(TrainConfig.from_flat(before), count).steps
    steps = plan_schedule(TrainConfig.from_flat(now), count).steps
    if steps < old_steps:
        differing.append(f"{old_steps} steps there, {steps} now (--epochs and --max-steps may only grow)")
    if state.fingerprint not in (None, splits.fingerprint):
        differing.append(f"the pictures of {splits.dataset_id} have changed")
    if differing:
        raise RequestError(
            f"{folder} holds another run: {'; '.join(differing)}. Give another --output-dir, or the same settings to "
            "go on"
        )
    if state.steps == steps and state.fault is not None:
        if not any((folder / "checkpoints").glob("step-*")):
            raise RequestError(f"{state.fault}, but there is no checkpoint left to do so from; train in another folder")
        _logger.warning("%s", state.fault)
    return state.steps == steps and state.fault is None


def _model_name(source: ModelSource) -> str:
    kind, _, name = public_model(source.requested).rpartition(":")
    return "-".join(Path(name).parts[-2:]) if kind else name


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "run"
