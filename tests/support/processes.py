"""Processes that tests start, and inputs and outputs that they share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import warm_start
from timm.models._hub import save_for_hf

ROOT = Path(__file__).resolve().parents[2]

TINY = ("--model", "test_resnet", "--mixed-precision", "no", "--warmup-epochs", "0", "--threads", "1")
"""Flags of a real but tiny network of timm, for tests of what is around the network."""


def run_process(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process in the checkout, forked with its libraries; its variables go over this process's."""
    words = [sys.executable, *map(str, arguments)]
    return warm_start.run(words, cwd=ROOT, env=os.environ | environment, timeout=timeout)


def run_interpreter(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python interpreter in the checkout, as a user starts it, which takes seconds longer than `run_process`."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def write_images(folder: Path, count: int, shade: int, size: int = 40) -> None:
    """Write small seeded images around a gray level, which a model can learn to tell."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(shade)
    for index in range(count):
        noise = generator.integers(-30, 30, (size, size + index % 7, 3))
        Image.fromarray(np.clip(shade + noise, 0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")


def small_model(folder: Path, model: torch.nn.Module | None = None, **config: object) -> Path:
    """Write a model folder of a tiny untrained model with 1,000 classes; `config` overrides entries of config.json."""
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("test_resnet") if model is None else model
    save_file(model.state_dict(), folder / "model.safetensors")
    content = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def save_with_timm(folder: Path, name: str, size: int) -> Path:
    """Have timm write a model folder of an untrained network, whose running statistics are those of some noise."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10, pretrained_cfg_overlay={"input_size": (3, size, size)})
    with torch.no_grad():
        network.train()(torch.randn(4, 3, size, size))
    save_for_hf(network, folder, safe_serialization=True)
    return folder
