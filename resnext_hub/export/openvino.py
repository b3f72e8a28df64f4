"""A network as OpenVINO has it: an XML file with its weights in a BIN file beside it."""

from pathlib import Path

import openvino
import torch
from torch import nn

from resnext_hub.errors import RunError, one_line
from resnext_hub.export.runtime import Run
from resnext_hub.files import new_files
from resnext_hub.kernels.openvino import OpenVinoModel, calibrate, convert
from resnext_hub.models.lookup import LoadedModel

FACTS = "resnext_hub"
"""Where the facts stand in the file's runtime information."""


class OpenVinoFormat:
    """OpenVINO's files; see `export.Format`."""

    suffix = ".xml"
    runtime = "OpenVINO"

    def check(self, model: LoadedModel) -> None:
        """Refuse nothing: the weights are a file of their own, of any size."""

    def build(self, network: nn.Module, example: torch.Tensor, facts: dict[str, str], text: str) -> openvino.Model:
        """Give the content of a file that takes any number of images, with facts as its metadata."""
        try:
            content = convert(network, example, dynamic=True)
        except RuntimeError as error:  # openvino's own errors are of this kind
            raise RunError(f"OpenVINO cannot convert the network: {one_line(error)}") from error
        content.inputs[0].get_tensor().set_names({"images"})
        content.outputs[0].get_tensor().set_names({"logits"})
        for name, value in (facts | {"description": text}).items():
            content.set_rt_info(value, [FACTS, name])
        return content

    def quantize(self, content: openvino.Model, images: torch.Tensor) -> openvino.Model:
        """Give the same in int8, calibrated on images `(M, C, H, W)`."""
        return calibrate(content, [part.numpy() for part in torch.split(images, 1)])

    def open(self, content: openvino.Model) -> Run:
        """Give what computes from a content."""
        return OpenVinoModel(content, torch.float32)

    def write(self, content: openvino.Model, path: Path) -> tuple[Path, ...]:
        """Write both files, whole or not at all: the XML file says that both are there."""
        with new_files(path.with_suffix(".bin"), path) as aside:
            openvino.save_model(content, aside / path.name, compress_to_fp16=False)
        return path, path.with_suffix(".bin")


FORMAT = OpenVinoFormat()
