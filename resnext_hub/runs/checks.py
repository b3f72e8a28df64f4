"""Checks of a request before anything is computed, so that it does not fail after hours of training."""

import shutil
from typing import Any

import torch

from resnext_hub.data.splits import Splits
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.export.model_folder import build_config
from resnext_hub.models.input_config import IMAGE_MODES, InputConfig
from resnext_hub.models.lookup import ModelSource, portable_architecture
from resnext_hub.models.saved import check_saving, without_values
from resnext_hub.models.saved_config import MAX_RESIZED, resized_side
from resnext_hub.processes.launcher import processes
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.elastic import check_elastic
from resnext_hub.runs.existing import nearest, require_writable
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.schedule import Schedule, sizes_of

MODEL_FOLDER_BYTES = 4_000_000
"""Disk space for plots, card, record and predictions of a small run, in bytes."""


def check_batch(config: TrainConfig) -> None:
    """Raise RequestError if the processes cannot share the global batch equally, or cannot mix their parts in pairs."""
    check_elastic(config)
    count, unit = config.elastic or processes(), "process" if config.elastic is None else "virtual process"
    if config.batch_size % count:
        low = config.batch_size // count * count
        closest = [str(size) for size in (low, low + count) if size]
        raise RequestError(
            f"{setting('batch_size', config.batch_size)} (the global batch size) cannot be divided evenly among "
            f"{count} {unit}es; use {' or '.join(closest)}"
        )
    part = config.batch_size // count
    if config.transform.mixes and part % 2:
        closest = [str(n * count) for n in (part - 1, part + 1) if n]
        raise RequestError(
            f"{setting('batch_size', config.batch_size)} gives {part} images per {unit}, but {setting('mixup')} and "
            f"{setting('cutmix')} need pairs of images; use {' or '.join(closest)}"
        )


def check_input(config: TrainConfig, input: InputConfig) -> None:
    """Raise RequestError if settings and `pretrained_cfg` together lead to an unsupported image format."""
    channels, height, width = input.input_size
    model = setting("model", config.model)
    if channels not in IMAGE_MODES:
        raise RequestError(
            f"{model} expects images with {channels} channels, but only 1 or 3 are supported; choose another model"
        )
    if height != width:
        raise RequestError(
            f"{model} expects images of {height} x {width} pixels (height x width), but training uses square "
            f"images; add {setting('image_size', max(height, width))}, or choose another model"
        )
    resized = resized_side(input.input_size, input.crop_pct)
    if resized > MAX_RESIZED:
        raise RequestError(
            f"{setting('image_size', width)} with {setting('crop_pct', f'{input.crop_pct:g}')} resizes images to "
            f"{resized:,} px for evaluation, but at most {MAX_RESIZED:,} px are allowed; reduce "
            f"{setting('image_size')} or increase {setting('crop_pct')}"
        )


def _check_loss(config: TrainConfig, splits: Splits) -> None:
    """Check that the loss fits the labels, and the settings that it has to support.

    Raises:
        RequestError: If it does not.
    """
    if config.loss == "cross-entropy" and splits.is_multi_label:
        raise RequestError(
            f"{setting('loss', 'cross-entropy')} needs exactly one label per image, but images of this dataset can "
            "have several; omit this setting"
        )
    balance = config.balance
    for name, neutral in (("class_weights", "none"), ("logit_adjustment", 0.0)):
        if config.loss == "bce" and not splits.is_multi_label and getattr(balance, name) != neutral:
            raise RequestError(
                f"{setting('loss', 'bce')} does not support {setting(name, getattr(balance, name))}; use "
                f"{setting('loss', 'cross-entropy')} or {setting('sampling', 'balanced')}"
            )


def check_model(
    config: TrainConfig, source: ModelSource, splits: Splits, input: InputConfig, schedule: Schedule
) -> int:
    """Check that the model accepts the settings and image sizes of the run, and that batch norm gets several values.

    The model is built on the meta device, so nothing is computed.

    Returns:
        Size of the weights in float32, in bytes.

    Raises:
        RequestError: If a check fails.
    """
    _check_loss(config, splits)
    classes = len(splits.label_names)
    model = without_values(lambda: source.saved.build(classes, config.drop_rate, config.drop_path))
    config.finetune.check_model(model, source.pretrained)
    full = input.image_size
    size = config.progressive_size or full
    if size > full:
        raise RequestError(
            f"{setting('progressive_size', size)} is larger than {setting('image_size', full)}; use {full} or smaller"
        )
    name = "progressive_size" if size < full else "image_size"
    info: Any = getattr(model, "feature_info", None)
    reduction = max((stage["reduction"] for stage in info), default=1) if info else 1
    if size < reduction:
        raise RequestError(
            f"{setting(name, size)} is smaller than the stride of {printable(config.model)} ({reduction}); use "
            f"{setting(name, reduction)} or larger"
        )
    for side in reversed(sizes_of(schedule.steps, config.progressive_size, full)):
        try:
            model.eval()(torch.empty(2, input.channels, side, side, device="meta"))
        except (AssertionError, RuntimeError) as error:
            if side == full and isinstance(error, RuntimeError):  # some models cannot run on the meta device
                break
            sizes = (
                setting("image_size", full)
                if side == full
                else f"{side} px, a size between {setting('progressive_size', size)} and {full}"
            )
            raise RequestError(
                f"{setting('model', config.model)} does not accept {sizes}: {one_line(error)}"
            ) from error
    _check_smallest_batch(config, model, size, reduction, name)
    architecture, model_args = portable_architecture(source)
    content = build_config(
        model,
        architecture=architecture,
        model_args=model_args,
        input=input,
        label_names=splits.label_names,
        license=None,
        plugin_facts={},
        thresholds=[0.5] * classes if splits.is_multi_label else None,
    )
    check_saving(setting("model", config.model), content, model)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def _check_smallest_batch(config: TrainConfig, model: torch.nn.Module, size: int, reduction: int, name: str) -> None:
    micro = config.images_per_pass(processes())
    smallest = config.batch_size // (config.elastic or processes()) % micro or micro
    has_batch_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    if smallest == 1 and size <= reduction and has_batch_norm:
        raise RequestError(
            f"{setting('batch_size', config.batch_size)} leaves a single image of {size} px for one forward pass, "
            "and its last feature map is 1 x 1, which is too small for batch norm; use at least 2 images per pass, or "
            f"{setting(name, size + 1)}"
        )


def check_space(folder: RunFolder, weight_bytes: int) -> None:
    """Raise RequestError if the folder is not writable, or its disk has no space for a checkpoint and the model folder.

    A checkpoint holds the weights and the state of the optimizer.
    """
    require_writable(folder)
    need, (total, _, free) = 4 * weight_bytes + MODEL_FOLDER_BYTES, shutil.disk_usage(nearest(folder))
    if total and free < need:  # some file systems report a size of 0
        raise RequestError(
            f"the disk that holds {printable(folder)} has only {free / 1e6:.0f} MB free, but a checkpoint and the "
            f"model folder need {need / 1e6:.0f} MB; free up some space, or choose another {setting('output_dir')}"
        )
