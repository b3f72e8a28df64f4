"""Export to OpenVINO's format: an XML file and a BIN file with the weights next to it."""

import copy
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import nn

from resnext_hub.errors import RunError, one_line
from resnext_hub.export.int8 import Check, Quantized
from resnext_hub.export.runtime import Run
from resnext_hub.files import new_files
from resnext_hub.kernels.fold import fold_batch_norms
from resnext_hub.kernels.openvino import OpenVinoModel, calibrate_within, convert, runner
from resnext_hub.models.lookup import LoadedModel

FACTS = "resnext_hub"
"""Key of the facts in the runtime information of the file."""


class OpenVinoFormat:
    """OpenVINO files; implements `resnext_hub.export.runtime.Format`."""

    suffix = ".xml"
    runtime = "OpenVINO"

    def check(self, model: LoadedModel) -> None:
        """Accept any model: the weights file has no size limit."""

    def build(self, model: nn.Module, example: torch.Tensor, facts: dict[str, str], text: str) -> openvino.Model:
        """Return the content of a file with a dynamic batch size, with facts as its metadata."""
        model = copy.deepcopy(model)
        fold_batch_norms(model)  # OpenVINO folds them as well, but then the layer has no name
        try:
            content = convert(model, example, dynamic=True)
        except RuntimeError as error:  # OpenVINO raises no more specific type
            raise RunError(f"OpenVINO cannot convert the model: {one_line(error)}") from error
        content.inputs[0].get_tensor().set_names({"images"})
        content.outputs[0].get_tensor().set_names({"logits"})
        for name, value in (facts | {"description": text}).items():
            content.set_rt_info(value, [FACTS, name])
        return content

    def quantize(self, content: openvino.Model, images: torch.Tensor, check: Check) -> Quantized:
        """Return the content quantized to int8, calibrated on images `(M, C, H, W)`, and good enough for a check."""
        inputs = [part.numpy() for part in torch.split(images, 1)]
        names = {operation.get_friendly_name(): _layer(operation) for operation in content.get_ops()}
        repaired = calibrate_within(content, inputs, lambda compiled, indices: check(runner(compiled), indices))
        return Quantized.of(repaired, names)

    def open(self, content: openvino.Model) -> Run:
        """Return a function that runs the content in OpenVINO."""
        return OpenVinoModel(content, torch.float32)

    def write(self, content: openvino.Model, path: Path) -> tuple[Path, ...]:
        """Write both files atomically, the XML file last; return their paths."""
        with new_files(path.with_suffix(".bin"), path) as aside:
            openvino.save_model(content, aside / path.name, compress_to_fp16=False)
        return path, path.with_suffix(".bin")


FORMAT = OpenVinoFormat()


def _layer(operation: Any) -> str:
    """Return the name of the layer that an operation belongs to, and its type if it is not the layer itself."""
    name = operation.get_friendly_name().removeprefix("__module.").partition("/")[0]
    return (
        name
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
        else (f"{name} ({operation.get_type_name()})")
    )
