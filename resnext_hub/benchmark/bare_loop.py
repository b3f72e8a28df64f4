"""A training loop as one would write it by hand, with timm's transforms and torch's loader; prints the accuracy.

It runs as a script, with its settings as JSON, so that nothing else of this package is imported.
"""

import json
import sys
from typing import Any

import timm
import torch
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def train(
    *,
    data: str,
    model: str,
    size: int,
    batch: int,
    epochs: int,
    lr: float,
    hflip: float,
    seed: int,
    device: str,
    precision: str,
    channels_last: bool,
) -> float:
    """Train a model from random weights; return its accuracy after the last epoch, 0 to 1."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"input_size": (3, size, size), "interpolation": "bilinear"}
    augment = create_transform(**common, is_training=True, scale=(0.7, 1.0), hflip=hflip, color_jitter=None)
    transform = create_transform(**common, crop_pct=1.0)
    training = ImageFolder(f"{data}/train", augment)
    loader = DataLoader(training, batch, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)
    validation = DataLoader(ImageFolder(f"{data}/validation", transform), 128, num_workers=1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = timm.create_model(model, num_classes=len(training.classes)).to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    types = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    cast = torch.autocast(device, dtype=types[precision], enabled=precision != "no")
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    for _ in range(epochs):
        net.train()
        for images, labels in loader:
            with cast:
                logits = net(images.to(device, memory_format=layout))
            optimizer.zero_grad()
            scaler.scale(loss_of(logits.float(), labels.to(device))).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    net.eval()
    correct = count = 0
    with torch.inference_mode(), cast:
        for images, labels in validation:
            logits = net(images.to(device, memory_format=layout))
            correct += int((logits.argmax(1).cpu() == labels).sum())
            count += len(labels)
    return correct / count


if __name__ == "__main__":
    import resnext_hub  # noqa: F401  # registers the variants

    sys.stdout.write(f"{train(**json.loads(sys.argv[1]))}\n")
