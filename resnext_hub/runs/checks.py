"""Checks of a request before anything is computed: what would fail after hours is refused at once."""

import shutil
from typing import Any

import torch

from resnext_hub.data.splits import Splits
from resnext_hub.errors import RequestError, one_line
from resnext_hub.export.model_folder import build_config
from resnext_hub.models.input_config import IMAGE_MODES, InputConfig
from resnext_hub.models.lookup import ModelSource, portable_architecture
from resnext_hub.models.saved import check_saving, without_values
from resnext_hub.models.saved_config import MAX_RESIZED, resized_side
from resnext_hub.processes.launcher import processes
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.existing import nearest, require_writable
from resnext_hub.text import printable
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.schedule import Schedule, sizes_of

MODEL_FOLDER_BYTES = 4_000_000
"""Room for plots, card, record and predictions of a small run."""


def check_batch(config: TrainConfig) -> None:
    """Refuse a global batch that the processes cannot share, or whose parts cannot be mixed in pairs."""
    count = processes()
    if config.batch_size % count:
        low = config.batch_size // count * count
        closest = [str(size) for size in (low, low + count) if size]
        raise RequestError(
            f"--batch-size {config.batch_size} is the global batch and not divisible by {count} processes; "
            f"nearest: {' or '.join(closest)}"
        )
    part = config.batch_size // count
    if config.transform.mixes and part % 2:
        raise RequestError(
            f"--batch-size {config.batch_size} makes {part} images per process, but --mixup and --cutmix need pairs; "
            f"nearest: {' or '.join(str(n * count) for n in (part - 1, part + 1) if n)}"
        )


def check_input(config: TrainConfig, input: InputConfig) -> None:
    """Refuse images that settings and `pretrained_cfg` together do not allow."""
    channels, height, width = input.input_size
    model = f"--model {printable(config.model)}"
    if channels not in IMAGE_MODES:
        raise RequestError(f"{model} takes {channels} channels; expected 1 or 3")
    if height != width:
        raise RequestError(
            f"{model} takes images of {height} x {width} pixels (height x width), and training makes square ones: add "
            f"--image-size, such as {max(height, width)}, or choose another model"
        )
    resized = resized_side(input.input_size, input.crop_pct)
    if resized > MAX_RESIZED:
        raise RequestError(
            f"--image-size {width} with --crop-pct {input.crop_pct:g} resizes images to {resized:,} px for evaluation: "
            f"expected at most {MAX_RESIZED:,}; reduce --image-size or increase --crop-pct"
        )


def check_model(
    config: TrainConfig, source: ModelSource, splits: Splits, input: InputConfig, schedule: Schedule
) -> int:
    """Refuse image sizes that the model does not take, and a batch norm over a single value.

    The model is built without values, so nothing is computed.

    Returns:
        Bytes of its weights in float32.
    """
    classes = len(splits.label_names)
    model = without_values(lambda: source.saved.build(classes, config.drop_rate, config.drop_path))
    full = input.image_size
    size = config.progressive_size or full
    if size > full:
        raise RequestError(f"--progressive-size {size}: expected less than --image-size, which is {full}")
    flag = "--progressive-size" if size < full else "--image-size"
    info: Any = getattr(model, "feature_info", None)
    reduction = max((stage["reduction"] for stage in info), default=1) if info else 1
    if size < reduction:
        raise RequestError(
            f"{flag} {size} is smaller than the stride of {config.model} ({reduction}); use {flag} {reduction} or larger"
        )
    for side in reversed(sizes_of(schedule.steps, config.progressive_size, full)):
        try:
            model.eval()(torch.empty(2, input.channels, side, side, device="meta"))
        except (AssertionError, RuntimeError) as error:
            if side == full and isinstance(error, RuntimeError):  # some models cannot run without values
                break
            what = (
                f"--image-size {full}"
                if side == full
                else f"{side} px, a size between --progressive-size {size} and {full}"
            )
            raise RequestError(f"--model {config.model} does not take {what}: {one_line(error)}") from error
    _check_smallest_batch(config, model, size, reduction, flag)
    architecture, model_args = portable_architecture(source)
    content = build_config(
        model,
        architecture=architecture,
        model_args=model_args,
        input=input,
        label_names=splits.label_names,
        license=None,
        plugin_facts={},
    )
    check_saving(f"--model {config.model}", content, model)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def _check_smallest_batch(config: TrainConfig, model: torch.nn.Module, size: int, reduction: int, flag: str) -> None:
    part = config.batch_size // processes()
    micro = config.micro_batch_size or part
    smallest = part % micro or min(micro, part)
    has_batch_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    if smallest == 1 and size <= reduction and has_batch_norm:
        raise RequestError(
            f"--batch-size {config.batch_size} leaves a forward pass with one image of {size} px, whose last feature "
            f"map is a single pixel: batch norm needs more; use at least 2 images per pass, or {flag} {size + 1}"
        )


def check_space(folder: RunFolder, weight_bytes: int) -> None:
    """Refuse a folder that is not writable, and a disk without room for a checkpoint and the model folder.

    A checkpoint holds the weights and what the optimizer keeps of each.
    """
    require_writable(folder)
    need, (total, _, free) = 4 * weight_bytes + MODEL_FOLDER_BYTES, shutil.disk_usage(nearest(folder))
    if total and free < need:  # some file systems state no size
        raise RequestError(
            f"the disk of {printable(folder)} has {free / 1e6:.0f} MB free, and a checkpoint with the model folder "
            f"takes {need / 1e6:.0f}; choose another --output-dir, or free space"
        )
