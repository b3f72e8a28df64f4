"""Measured speed of a study's members, since equal multiply-adds are not equal time."""

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from resnext_hub.files import read_json, write_json
from resnext_hub.machine import processor_name, versions
from resnext_hub.study.plan import Study
from resnext_hub.training.schedule import plan_schedule

_logger = logging.getLogger(__name__)

ROUNDS = 5
"""Rounds of a measurement, in which the members take turns."""


def machine_facts() -> dict[str, Any]:
    """Return the processor, its threads and the versions that measurements hold for."""
    device = torch.device("cpu")
    return {"processor": processor_name(device), "threads": torch.get_num_threads(), "versions": versions()}


def inference_speed(study: Study) -> dict[str, float]:
    """Return images/s of each member's forward pass on the CPU, in eager float32, and keep them in the study folder.

    They are measured once for a machine and its versions, with the batch size of evaluation.
    """
    size = study.train_config.eval_batch_size
    machine = machine_facts() | {"batch_size": size, "image_size": study.input.image_size}
    names = [member.name for member in study.design.members]
    path = study.folder.speed
    if path.is_file():
        kept = read_json(path, dict[str, Any], "remove it, and rerun the study to measure again")
        if kept.get("machine") == machine and set(names) <= set(kept.get("inference", {})):
            return {name: float(kept["inference"][name]) for name in names}
    _logger.info("measuring inference speed")
    images = _noise(study, size)

    @torch.inference_mode()
    def forward(model: nn.Module) -> None:
        model.eval()(images)

    found = _throughput(study, forward, size)
    write_json(path, {"machine": machine, "inference": found})
    return found


def training_seconds(study: Study) -> dict[str, float]:
    """Return an estimate of the seconds of one run of each member, without its start and its evaluations."""
    config = study.train_config
    size = config.micro_batch_size or config.batch_size
    images = _noise(study, size)
    labels = torch.arange(size) % len(study.splits.label_names)

    def forward_and_backward(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()

    steps = plan_schedule(config, study.splits.train.count).steps
    return {
        name: steps * config.batch_size / speed
        for name, speed in _throughput(study, forward_and_backward, size).items()
    }


def _noise(study: Study, size: int) -> torch.Tensor:
    return torch.randn(size, *study.input.input_size, generator=torch.Generator().manual_seed(0))


def _throughput(study: Study, work: Callable[[nn.Module], None], size: int) -> dict[str, float]:
    """Return the median images/s of each member; they take turns, after a round of warm-up."""
    classes = len(study.splits.label_names)
    models = {
        member.name: timm.create_model(
            member.variant.name, num_classes=classes, in_chans=study.input.channels, **member.variant.model_args
        ).to(memory_format=torch.channels_last)
        for member in study.design.members
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(study.threads)
    try:
        for number in range(ROUNDS + 1):
            for name, model in models.items():
                start = time.perf_counter()
                work(model)
                if number:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return {name: size / statistics.median(values) for name, values in seconds.items()}
