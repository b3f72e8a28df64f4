"""Compute the logits of decoded images with timm alone: `verify` runs this file in a process of its own.

It imports nothing of this package, except to register a variant that timm does not have. Standard input has batches of
images, standard output a line of JSON and then the logits of each batch, `(N, classes)` float32; see `recount.py`.
"""

import argparse
import json
import struct
import sys
from collections.abc import Iterator
from typing import IO

import numpy as np
import timm
import torch
from PIL import Image


def main() -> None:
    """Answer each batch from standard input with its logits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="model folder")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flip", action="store_true", help="average the logits of an image and of its mirror image")
    parser.add_argument("--plugin", action="store_true", help="register the variants of resnext-hub")
    options = parser.parse_args()
    if options.plugin:
        import resnext_hub  # noqa: F401 - registers the variants
    output, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever a library prints is no result
    torch.set_num_threads(options.threads)
    model = timm.create_model(f"local-dir:{options.folder}", pretrained=True)
    model = model.eval().to(options.device).to(memory_format=torch.channels_last)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    facts = {"timm": timm.__version__, "plugin": "resnext_hub" in sys.modules}
    output.write(json.dumps(facts).encode() + b"\n")
    output.flush()
    for images in read_batches(sys.stdin.buffer):
        # all forward passes have the same shape, on which the last bits of logits depend
        inputs = torch.stack([transform(image) for image in images])
        inputs = torch.cat([inputs, inputs.new_zeros(options.batch_size - len(images), *inputs.shape[1:])])
        output.write(compute(model, inputs.to(options.device), options.flip)[: len(images)].tobytes())
        output.flush()


def read_batches(stream: IO[bytes]) -> Iterator[list[Image.Image]]:
    """Yield batches: their number of images, and for each its height, width, number of channels and pixels."""
    while header := stream.read(4):
        images = []
        for _ in range(*struct.unpack("<I", header)):
            height, width, channels = struct.unpack("<3I", stream.read(12))
            pixels = np.frombuffer(stream.read(height * width * channels), np.uint8).reshape(height, width, channels)
            images.append(Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels))
        yield images


@torch.inference_mode()
def compute(model: torch.nn.Module, inputs: torch.Tensor, flip: bool) -> np.ndarray:
    """Return logits `(N, classes)` float32; with `flip`, the mean of those of an image and of its mirror image."""
    views = [inputs, inputs.flip(-1)] if flip else [inputs]
    logits = [model(view.contiguous(memory_format=torch.channels_last)).float() for view in views]
    return torch.stack(logits).mean(dim=0).cpu().numpy()


if __name__ == "__main__":
    main()
