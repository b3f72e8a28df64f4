"""Export to a single ONNX file for ONNX Runtime."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it; import it early so a missing package fails before any work
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.export.int8 import Check, Quantized
from resnext_hub.export.runtime import Run
from resnext_hub.files import write_atomic
from resnext_hub.kernels.openvino import calibrate_within
from resnext_hub.models.lookup import LoadedModel

MOST_BYTES = 2**31 - 2**20
"""Largest size of the weights; protobuf limits the file, with the graph, to 2 GiB."""


class OnnxFormat:
    """ONNX files; implements `resnext_hub.export.runtime.Format`."""

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

    def build(self, model: nn.Module, example: torch.Tensor, facts: dict[str, str], text: str) -> onnx.ModelProto:
        """Return the content of a file with a dynamic batch size, with facts as its metadata."""
        try:
            # with an attention bias, the fused CPU kernel returns strides that torch.export does not predict
            with sdpa_kernel(SDPBackend.MATH):
                program = torch.onnx.export(
                    model,
                    (example,),
                    dynamo=True,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
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
                    f"the model fixes the batch size of its {value.name} to {len(example)}; "
                    "expected a dynamic batch size"
                )
        _remove_origin(content)
        content.doc_string = text
        onnx.helper.set_model_props(content, facts)
        return content

    def quantize(self, content: onnx.ModelProto, images: torch.Tensor, check: Check) -> Quantized:
        """Return the content quantized to int8, calibrated on images `(M, C, H, W)`, and good enough for a check."""
        facts = {entry.key: entry.value for entry in content.metadata_props}
        inputs = [{"images": part.numpy()} for part in torch.split(images, 1)]
        repaired = calibrate_within(content, inputs, lambda model, indices: check(self.open(model), indices))
        _remove_origin(repaired.model)
        repaired.model.doc_string = content.doc_string
        onnx.helper.set_model_props(repaired.model, facts)
        return Quantized.of(repaired, {node.name: _layer(node) for node in content.graph.node})

    def open(self, content: onnx.ModelProto) -> Run:
        """Return a function that runs the content in ONNX Runtime."""
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

        def run(images: torch.Tensor) -> torch.Tensor:
            try:
                return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
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
    return weight.removesuffix(".weight") if weight.endswith(".weight") else f"{node.name} ({node.op_type})"


def _remove_origin(message: Any) -> None:
    """Remove the source location of every node: it contains local paths, and is half of the size of a small file."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                _remove_origin(part)
