"""Export to a single ONNX file for ONNX Runtime."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.compose
import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it; import it early so a missing package fails before any work
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.export.int8 import Check, Quantized
from resnext_hub.export.parts import Part
from resnext_hub.export.runtime import Run
from resnext_hub.files import write_atomic
from resnext_hub.kernels.openvino import calibrate_within
from resnext_hub.models.lookup import LoadedModel

MOST_BYTES = 2**31 - 2**20
"""Largest size of the weights; protobuf limits the file, with the graph, to 2 GiB."""


class OnnxFormat:
    """ONNX files; implements `resnext_hub.export.runtime.QuantizingFormat`."""

    suffix = ".onnx"
    runtime = "ONNX Runtime"

    def check(self, model: LoadedModel) -> None:
        """Raise RequestError if the weights exceed 2 GiB."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.model.state_dict().values())
        if size > MOST_BYTES:
            raise RequestError(
                f"the model has {size / 1e9:.1f} GB of weights, but an ONNX file holds at most 2 GiB; use "
                f"{setting('format', 'openvino')}"
            )

    def build(self, part: Part) -> onnx.ModelProto:
        """Return a part as the content of a file."""
        dimensions = {name: torch.export.Dim(name) for axes in part.dynamic_axes for name in axes.values()}
        shapes = [{axis: dimensions[name] for axis, name in axes.items()} for axes in part.dynamic_axes]
        try:
            # with an attention bias, the fused CPU kernel returns strides that torch.export does not predict
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="# The axis name")  # two inputs have the same batch size
                program = torch.onnx.export(
                    part.module,
                    part.example,
                    dynamo=True,
                    input_names=list(part.inputs),
                    output_names=list(part.outputs),
                    dynamic_shapes=shapes,
                    optimize=True,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise RunError(f"torch.onnx cannot export the model: {one_line(error.__cause__ or error)}") from error
        assert program is not None  # it is None only for TorchScript
        content: onnx.ModelProto = program.model_proto
        for value in (*content.graph.input, *content.graph.output):
            if not value.type.tensor_type.shape.dim[0].dim_param:
                raise RunError(
                    f"the model fixes the batch size of its {value.name} to {len(part.example[0])}; "
                    "expected a dynamic batch size"
                )
        _remove_origin(content)
        return content

    def join(self, contents: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
        """Return contents that follow one another as one, joined by the names of their outputs and inputs."""
        whole, *others = (
            onnx.compose.add_prefix(content, f"{index}/", rename_inputs=False, rename_outputs=False)
            for index, content in enumerate(contents)
        )
        for content in others:
            names = [(value.name, value.name) for value in content.graph.input]
            whole = onnx.compose.merge_models(whole, content, io_map=names)
        return whole

    def describe(self, content: onnx.ModelProto, facts: dict[str, str], text: str) -> None:
        """Set the metadata of a content."""
        content.doc_string = text
        onnx.helper.set_model_props(content, facts)

    def quantize(self, content: onnx.ModelProto, images: torch.Tensor, check: Check) -> Quantized:
        """Return the content of a model quantized to int8, calibrated on images, and good enough for a check."""
        given = content.graph.input[0].name
        inputs = [{given: part.numpy()} for part in torch.split(images, 1)]
        repaired = calibrate_within(content, inputs, lambda model, indices: check(self.open(model), indices))
        _remove_origin(repaired.model)
        return Quantized.of(repaired, {node.name: _layer(node) for node in content.graph.node})

    def open(self, content: onnx.ModelProto) -> Run:
        """Return a function that runs the content in ONNX Runtime, and returns its first output."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        failures = (
            runtime.Fail,
            runtime.InvalidArgument,
            runtime.InvalidGraph,
            runtime.NotImplemented,
            runtime.RuntimeException,
        )
        prefix = f"ONNX Runtime {onnxruntime.__version__} cannot run the model"
        try:
            session = onnxruntime.InferenceSession(
                content.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except failures as error:
            raise RunError(f"{prefix}: {one_line(error)}") from error

        given, returned = session.get_inputs()[0].name, session.get_outputs()[0].name

        def run(images: torch.Tensor) -> torch.Tensor:
            try:
                return torch.from_numpy(session.run([returned], {given: images.numpy()})[0])
            except failures as error:
                raise RunError(f"{prefix}: {one_line(error)}") from error

        return run

    def write(self, content: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
        """Write the file atomically; return its path in a tuple."""
        write_atomic(path, content.SerializeToString())
        return (path,)


FORMAT = OnnxFormat()


def _layer(node: onnx.NodeProto) -> str:
    """Return the name of the layer whose weight a node has, or its own."""
    weight = node.input[1] if len(node.input) > 1 else ""
    return (
        weight.removeprefix("model.").removesuffix(".weight")
        if weight.endswith(".weight")
        else f"{node.name} ({node.op_type})"
    )


def _remove_origin(message: Any) -> None:
    """Remove the source location of every node: it contains local paths, and is half of the size of a small file."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                _remove_origin(part)
