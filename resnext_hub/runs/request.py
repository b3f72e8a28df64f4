"""Validate a request and resolve it into a Plan.

Every process does this, but only the main process reads the run folder. Nothing is computed.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from resnext_hub.data.config import NO_TEST, DataConfig
from resnext_hub.data.images import StreamedImages
from resnext_hub.data.jpeg import is_installed
from resnext_hub.data.lanes import fitting_lanes
from resnext_hub.data.loaders import derive_workers
from resnext_hub.data.sources import check_source, dataset_name
from resnext_hub.data.splits import Images, Splits, load_splits
from resnext_hub.data.transforms import resolve_input
from resnext_hub.errors import RequestError, setting
from resnext_hub.hub.publish import check_request
from resnext_hub.machine import device_type, resolve_precision
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.lookup import ModelSource, find_model
from resnext_hub.processes.accelerator import check_devices
from resnext_hub.processes.host import once_per_host
from resnext_hub.processes.launcher import check_launcher, local_processes
from resnext_hub.processes.peers import Peers
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.auto import SETTINGS, choose
from resnext_hub.runs.checks import check_batch, check_input, check_model, check_space
from resnext_hub.runs.elastic import resolve_elastic
from resnext_hub.runs.existing import (
    CONFIG_VERSION,
    is_finished,
    read_config,
    read_existing,
    require_run_on_main_host,
)
from resnext_hub.runs.public import public_model
from resnext_hub.runs.recipes import AUTO, QUICKSTART, find_recipe
from resnext_hub.settings import shown
from resnext_hub.text import listing, printable, slug
from resnext_hub.training.balance import resolve_balance
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.optim import check_optimizer, derive_lr
from resnext_hub.training.plan import Plan
from resnext_hub.training.schedule import plan_schedule
from resnext_hub.yaml_files import read_yaml

_logger = logging.getLogger(__name__)

RUNS = Path("runs")
"""Folder of run folders, if `output_dir` is not given."""


def merge_settings(
    asked: Mapping[str, Any],
    recipe: str | None = None,
    file: Path | None = None,
    fetched: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str | None]:
    """Merge settings; those of the user override those of the file, which override the recipe.

    If no dataset is given, the recipe is quickstart.

    Args:
        asked: Flat settings that the user gave.
        recipe: Name of a recipe.
        file: A YAML file of flat settings.
        fetched: Settings of a run on the Hub, used if there is no file.

    Returns:
        The flat settings, and the name of the recipe, if any.

    Raises:
        RequestError: If there is no such recipe or file, or the file is not a mapping.
    """
    from_file: dict[str, Any] = dict(fetched or {})
    if file is not None:
        try:
            from_file = read_yaml(file, "expected a file of settings, one `name: value` per line")
        except RequestError as error:
            raise RequestError(f"{setting('config')} {error}") from error
        version = from_file.pop("format_version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise RequestError(f"{setting('config', file)} has format version {shown(version)}; update resnext-hub")
    if from_file.get("group_duplicates"):  # the default wherever images are held out
        del from_file["group_duplicates"]
    if "test_fraction" in asked:
        from_file.pop("test_split", None)
    if recipe is None and not {"dataset"} & (from_file.keys() | asked.keys()):
        recipe = QUICKSTART
    try:
        named = find_recipe(recipe).settings if recipe is not None else {}
    except RequestError as error:
        raise RequestError(f"{setting('recipe', shown(recipe))} {error}") from error
    return {**named, **from_file, **asked}, recipe


def prepare(
    settings: Mapping[str, Any],
    *,
    asked: Mapping[str, Any],
    recipe: str | None = None,
    output_dir: Path | None = None,
    resume: bool | None = None,
    resume_from: Path | None = None,
    peers: Peers | None = None,
    place: Callable[[Path], Path] = lambda folder: folder,
) -> Plan:
    """Validate a request and resolve its open settings, without computing anything.

    Args:
        settings: Flat settings, merged.
        asked: The settings that the user gave, for the command in the record.
        recipe: Name of the recipe, if any.
        output_dir: The run folder; `runs/{dataset}-{model}` if not given.
        resume: Whether to resume a run in the folder; None resumes one if there is one, False refuses a used folder.
        resume_from: Folder of a fetched run, to resume if the run folder holds none.
        peers: The processes of the run; only the main process reads the run folder. A single process if not given.
        place: Returns where the run is, given `output_dir` or its default.

    Raises:
        RequestError: If the request is invalid.
        RunError: If the Hub is needed and cannot be reached.
    """
    check_launcher()
    check_devices(device := device_type())
    config = TrainConfig.from_flat(settings)
    check_batch(config)
    if config.publish.repo_id is not None:
        check_request(None, config.publish.repo_id, config.publish.license or "other")
    precision = resolve_precision(config.mixed_precision, device)

    check_source(config.data)
    source = find_model(config.model, config.pretrained)
    folder = RunFolder(place(output_dir or _default_folder(config, source)))
    peers = peers or Peers()
    existing = peers.from_main(lambda: read_existing(folder))
    before = existing.settings
    config = _continue(config, folder, before, resume)
    resumed = before or (read_config(RunFolder(resume_from)) if resume_from else {})
    config = _choose_decoder(config, folder, resumed, asked)
    splits = _open(config.data, peers)
    recipe, config = _choose(config, recipe, settings, before, splits, source)
    input = resolve_input(config.transform, source.pretrained_cfg)
    check_input(config, input)
    config = _resolve(resolve_elastic(config, resumed, device), source, splits, input, device)
    check_optimizer(config.optim, device)
    schedule = plan_schedule(config, splits.train.count)
    balance = resolve_balance(config.balance, splits.train, splits.label_names)
    weight_bytes = check_model(config, source, splits, input, schedule)

    def check_folder() -> bool:
        finished = is_finished(folder, existing, resume_from, config, splits, balance, schedule)
        if not finished:
            check_space(folder, weight_bytes)
        return finished

    # only the main process compares paths with earlier ones: the dataset may have another path on another host
    finished = peers.from_main(check_folder)
    require_run_on_main_host(folder, config, peers)
    if not finished:
        _require_decoder(config, printable(folder) if before else setting("decoder", "simplejpeg"))
    return Plan(
        config=config,
        source=source,
        splits=splits,
        input=input,
        schedule=schedule,
        balance=balance,
        precision=precision,
        folder=folder,
        asked=dict(asked),
        recipe=recipe,
        finished=finished,
        resume_from=resume_from,
        folder_state=existing.state,
    )


def _choose(
    config: TrainConfig,
    recipe: str | None,
    settings: Mapping[str, Any],
    before: Mapping[str, Any],
    splits: Splits,
    source: ModelSource,
) -> tuple[str | None, TrainConfig]:
    """Return the recipe, `auto` for pretrained weights if there is none, and the configuration with its choices.

    An existing run keeps what it was started with.

    Args:
        config: The configuration.
        recipe: Name of the recipe.
        settings: Flat settings of the request, which override those of `auto`.
        before: Flat settings of the run in the folder, if any.
        splits: The images.
        source: The model.
    """
    if recipe is None and source.pretrained:
        recipe = AUTO
    if recipe != AUTO:
        return recipe, config
    chosen = {name: before[name] for name in SETTINGS} if before else choose(splits, source, config)
    config = TrainConfig.from_flat(config.to_flat() | {k: v for k, v in chosen.items() if k not in settings})
    check_batch(config)
    return recipe, config


def _open(data: DataConfig, peers: Peers) -> Splits:
    """Open a dataset, in one process of each host unless it is streamed."""
    return load_splits(data) if data.streaming else once_per_host(peers, lambda: load_splits(data))


def _default_folder(config: TrainConfig, source: ModelSource) -> Path:
    name = f"{slug(dataset_name(config.data))}-{slug(_model_name(source))}"
    if config.data.folds is None:
        return RUNS / name
    return RUNS / f"{name}-folds-{config.data.folds}" / f"fold-{config.data.fold or 1}"


def _continue(config: TrainConfig, folder: RunFolder, before: Mapping[str, Any], resume: bool | None) -> TrainConfig:
    """Keep how the run in the folder reads its dataset: its commit, even if there are newer ones, and its splits.

    Raises:
        RequestError: If there is a run, but `resume` is False.
    """
    if resume and not before:
        _logger.warning("--resume is ignored because %s contains no run; starting at step 0", printable(folder))
    if resume is False and before:
        raise RequestError(
            f"{setting('resume', False)} was given, but {printable(folder)} already contains a run; choose another "
            f"{setting('output_dir')}, or remove the run"
        )
    data = config.data
    path = Path(data.dataset).expanduser()
    if before and before.get("dataset") in (data.dataset, str(path.absolute()), str(path.resolve())):
        if data.dataset_revision is None:
            data = dataclasses.replace(data, dataset_revision=before.get("dataset_revision"))
        if before["test_split"] == NO_TEST and data.test_split is None and not data.test_fraction:
            evaluation = data.eval_split or before.get("eval_split")
            data = dataclasses.replace(data, test_split=NO_TEST, eval_split=evaluation)
        if before["group_duplicates"] is False and data.group_duplicates is None:
            data = dataclasses.replace(data, group_duplicates=False)
    return dataclasses.replace(config, data=data)


def _choose_decoder(
    config: TrainConfig, folder: RunFolder, before: Mapping[str, Any], asked: Mapping[str, Any]
) -> TrainConfig:
    """Keep the decoder of a resumed run, else choose the fast one if it is installed; the user can override both.

    Raises:
        RequestError: If a file or recipe, rather than the user, would change the decoder of a resumed run.
    """
    old = before.get("decoder", "pil") if before else None
    decoder = config.loader.decoder
    if decoder == "auto":
        decoder = old or ("simplejpeg" if is_installed() else "pil")
    if old not in (None, decoder) and "decoder" not in asked:
        raise RequestError(
            f"the images of the run in {printable(folder)} were decoded with {old}, but it would be resumed with "
            f"{decoder}, which decodes to slightly different pixels; if this is intended, add "
            f"{setting('decoder', decoder)}"
        )
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, decoder=decoder))


def _require_decoder(config: TrainConfig, what: str) -> None:
    """Raise RequestError if the fast decoder is not installed but needed, by a run or by a setting."""
    if config.loader.decoder == "simplejpeg" and not is_installed():
        raise RequestError(
            f'{what} needs simplejpeg, which is not installed; pip install "resnext-hub[train]", or use '
            f"{setting('decoder', 'pil')}, which decodes to slightly different pixels"
        )


def _resolve(config: TrainConfig, source: ModelSource, splits: Splits, input: InputConfig, device: str) -> TrainConfig:
    """Return the configuration with every open field derived from model, data and device."""
    optim, loader = config.optim, config.loader
    found = splits.found
    default_smoothing = 0.0 if splits.is_multi_label else 0.1
    if splits.revision is not None:
        found = dataclasses.replace(found, dataset_revision=splits.revision)
    return dataclasses.replace(
        config,
        model=source.requested,
        pretrained=source.pretrained,
        deterministic=device == "cpu" if config.deterministic is None else config.deterministic,
        data=dataclasses.replace(found, lanes=_lanes(config, splits.train)),
        transform=dataclasses.replace(
            config.transform,
            image_size=input.image_size,
            crop_pct=input.crop_pct,
            interpolation=input.interpolation,
            mean=_three(input.mean),
            std=_three(input.std),
        ),
        loader=dataclasses.replace(
            loader,
            workers=derive_workers(device, local_processes()) if loader.workers is None else loader.workers,
        ),
        loss=config.loss or ("bce" if splits.is_multi_label else "cross-entropy"),
        label_smoothing=default_smoothing if config.label_smoothing is None else config.label_smoothing,
        balance=dataclasses.replace(
            config.balance,
            class_weights=_absolute(config.balance.class_weights),
            best_by=config.balance.best_by or _selection(config, splits.is_multi_label),
        ),
        optim=dataclasses.replace(
            optim, lr=optim.lr or derive_lr(optim.optimizer, config.batch_size, source.pretrained)
        ),
    )


def _lanes(config: TrainConfig, train: Images) -> int | None:
    """Return the number of lanes of a stream; None for other images.

    Raises:
        RequestError: If the requested number does not divide the batch.
    """
    if not isinstance(train, StreamedImages):
        return None
    if config.data.lanes is None:
        return fitting_lanes(config.batch_size, train.row_groups)
    if config.batch_size % config.data.lanes:
        fitting = [lanes for lanes in range(1, config.batch_size + 1) if config.batch_size % lanes == 0]
        raise RequestError(
            f"{setting('lanes', config.data.lanes)} does not divide {setting('batch_size', config.batch_size)}; use "
            f"one of {listing(fitting, len(fitting))}"
        )
    return config.data.lanes


def _selection(config: TrainConfig, is_multi_label: bool) -> Literal["last", "map", "top1"]:
    """Return what selects the weights of a run: in cross-validation nothing, so that its results are not optimistic."""
    if config.data.folds is not None and config.finetune.early_stopping is None:
        return "last"
    return "map" if is_multi_label else "top1"


def _absolute(class_weights: str) -> str:
    return class_weights if class_weights in ("auto", "none") else os.path.abspath(os.path.expanduser(class_weights))


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, *rest = [float(value) for value in values]
    return (first, rest[0], rest[1]) if rest else (first, first, first)


def _model_name(source: ModelSource) -> str:
    kind, _, name = public_model(source.requested).rpartition(":")
    return "-".join(Path(name).parts[-2:]) if kind else name
