"""Export to OpenVINO's format: an XML file and a BIN file with the weights next to it."""

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino
import torch

from resnext_hub.errors import RunError, one_line
from resnext_hub.export.int8 import Check, Quantized
from resnext_hub.export.parts import Part
from resnext_hub.export.runtime import Run
from resnext_hub.files import new_files
from resnext_hub.kernels.fold import fold_batch_norms
from resnext_hub.kernels.openvino import OpenVinoModel, calibrate_within, convert, runner
from resnext_hub.machine import quiet_compilers
from resnext_hub.models.lookup import LoadedModel

FACTS = "resnext_hub"
"""Key of the facts in the runtime information of the file."""


class OpenVinoFormat:
    """OpenVINO files; implements `resnext_hub.export.runtime.QuantizingFormat`."""

    suffix = ".xml"
    runtime = "OpenVINO"

    def check(self, model: LoadedModel) -> None:
        """Accept any model: the weights file has no size limit."""

    def build(self, part: Part) -> openvino.Model:
        """Return a part as the content of a file."""
        try:
            # what depends on the size of an image cannot be traced
            content = _converted(part) if part.dynamic or len(part.inputs) > 1 else _traced(part)
        except RuntimeError as error:  # OpenVINO raises no more specific type
            raise RunError(f"OpenVINO cannot convert the model: {one_line(error)}") from error
        for name, port in zip((*part.inputs, *part.outputs), (*content.inputs, *content.outputs), strict=True):
            port.get_node().set_friendly_name(name)
            port.get_tensor().set_names({name})
        return content

    def join(self, contents: Sequence[openvino.Model]) -> openvino.Model:
        """Return contents that follow one another as one, joined by the names of their outputs and inputs."""
        first, *others = contents
        results = first.get_results()
        for content in others:
            # by the names of nodes: a tensor that is passed on has only one name
            sources = {result.get_friendly_name(): result.input_value(0) for result in results}
            for parameter in content.get_parameters():
                for target in parameter.output(0).get_target_inputs():
                    target.replace_source_output(sources[parameter.get_friendly_name()])
            results = content.get_results()
        for result in results:
            result.output(0).get_tensor().set_names({result.get_friendly_name()})
        return openvino.Model(results, first.get_parameters(), "classifier")

    def describe(self, content: openvino.Model, facts: dict[str, str], text: str) -> None:
        """Set the metadata of a content."""
        for name, value in (facts | {"description": text}).items():
            content.set_rt_info(value, [FACTS, name])

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


def _converted(part: Part) -> openvino.Model:
    """Convert a part whose operations depend on the dynamic axes."""
    dimensions = {name: torch.export.Dim(name) for axes in part.dynamic_axes for name in axes.values()}
    shapes = tuple({axis: dimensions[name] for axis, name in axes.items()} for axes in part.dynamic_axes)
    program = torch.export.export(part.module, part.example, dynamic_shapes=shapes)
    with quiet_compilers(), contextlib.redirect_stdout(io.StringIO()):
        content = openvino.convert_model(program)
    for port, example, axes in zip(content.inputs, part.example, part.dynamic_axes, strict=True):
        sides = [-1 if axis in axes else side for axis, side in enumerate(example.shape)]
        port.get_node().set_partial_shape(openvino.PartialShape(sides))
    content.validate_nodes_and_infer_types()
    return content


def _traced(part: Part) -> openvino.Model:
    """Convert a model by tracing, which keeps the names of the layers."""
    module = copy.deepcopy(part.module)
    fold_batch_norms(module)  # OpenVINO folds them as well, but then the layer has no name
    return convert(module, part.example[0], dynamic=True)


def _layer(operation: Any) -> str:
    """Return the name of the layer that an operation belongs to, and its type if it is not the layer itself."""
    name = operation.get_friendly_name().removeprefix("__module.").removeprefix("model.").partition("/")[0]
    own = operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
    return name if own else f"{name} ({operation.get_type_name()})"
