"""A network as one ONNX file, which ONNX Runtime computes."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it: if it is missing, that shows before any work
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.export.runtime import Run
from resnext_hub.files import write_atomic
from resnext_hub.kernels.openvino import calibrate
from resnext_hub.models.lookup import LoadedModel

MOST_BYTES = 2**31 - 2**20
"""Weights that fit one file, of which protobuf allows 2 GiB with the graph."""


class OnnxFormat:
    """ONNX files; see `export.Format`."""

    suffix = ".onnx"
    runtime = "ONNX Runtime"

    def check(self, model: LoadedModel) -> None:
        """Refuse a network of more than 2 GiB."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.model.state_dict().values())
        if size > MOST_BYTES:
            raise RequestError(f"the network has {size / 1e9:.1f} GB of weights, and an ONNX file holds at most 2 GiB")

    def build(self, network: nn.Module, example: torch.Tensor, facts: dict[str, str], text: str) -> onnx.ModelProto:
        """Give the content of a file that takes any number of images, with facts as its metadata."""
        try:
            # the fused attention of a CPU has strides that torch.export does not see, where a bias is added in it
            with sdpa_kernel(SDPBackend.MATH):
                program = torch.onnx.export(
                    network,
                    (example,),
                    dynamo=True,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    optimize=True,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise RunError(f"torch cannot export the network: {one_line(error.__cause__ or error)}") from error
        assert program is not None  # as there is no TorchScript in it
        content: onnx.ModelProto = program.model_proto
        for value in (*content.graph.input, *content.graph.output):
            if not value.type.tensor_type.shape.dim[0].dim_param:
                raise RunError(f"the network binds its {value.name} to a batch of {len(example)}: expected any size")
        _forget_origin(content)
        content.doc_string = text
        onnx.helper.set_model_props(content, facts)
        return content

    def quantize(self, content: onnx.ModelProto, images: torch.Tensor) -> onnx.ModelProto:
        """Give the same in int8, calibrated on images `(M, C, H, W)`."""
        facts = {entry.key: entry.value for entry in content.metadata_props}
        quantized: onnx.ModelProto = calibrate(content, [{"images": part.numpy()} for part in torch.split(images, 1)])
        _forget_origin(quantized)
        quantized.doc_string = content.doc_string
        onnx.helper.set_model_props(quantized, facts)
        return quantized

    def open(self, content: onnx.ModelProto) -> Run:
        """Give what computes from a content."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        failures = (
            runtime.Fail,
            runtime.InvalidArgument,
            runtime.InvalidGraph,
            runtime.NotImplemented,
            runtime.RuntimeException,
        )
        what = f"ONNX Runtime {onnxruntime.__version__} cannot run the network"
        try:
            session = onnxruntime.InferenceSession(
                content.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except failures as error:
            raise RunError(f"{what}: {one_line(error)}") from error

        def run(images: torch.Tensor) -> torch.Tensor:
            try:
                return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
            except failures as error:
                raise RunError(f"{what}: {one_line(error)}") from error

        return run

    def write(self, content: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
        """Write a content, whole or not at all; give the files."""
        write_atomic(path, content.SerializeToString())
        return (path,)


FORMAT = OnnxFormat()


def _forget_origin(message: Any) -> None:
    """Remove where every node comes from: it tells paths of this machine, and is half of a small file."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                _forget_origin(part)
