"""A trained network as one ONNX file that suffices by itself: network, preprocessing and labels.

The file is written only if ONNX Runtime gives torch's logits.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it: if it is missing, that shows before any work
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import write_atomic
from resnext_hub.inference.trained import TrainedModel

BATCH_SIZES = (1, 2, 7)
"""Numbers of pictures at which the file is compared with the network."""

TOLERANCE = 1e-4
"""Greatest relative error; another order of float32 sums makes about 1e-6, and a wrong graph far more than this."""

MOST_BYTES = 2**31 - 2**20
"""Weights that fit one file, of which protobuf allows 2 GiB with the graph."""

RESIZING = {
    "center": "resize so that the shorter edge is floor(size / crop_pct) pixels, and crop the centre",
    "squash": "resize both edges to floor(size / crop_pct) pixels, and crop the centre",
    "border": "resize so that the longer edge is floor(size / crop_pct) pixels, and crop or pad with mean to size",
}
"""What timm's crop modes mean, in words for whoever opens the file."""


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A written file, and how far ONNX Runtime's logits are from torch's, over all batch sizes."""

    path: Path
    absolute_error: float
    relative_error: float
    """Relative to the greatest logit of the same picture."""


def export_onnx(model: TrainedModel, path: Path | None = None, *, tolerance: float = TOLERANCE) -> OnnxFile:
    """Write a network as ONNX, checked by ONNX Runtime against torch.

    The input `images` is `(N, C, H, W)` float32, normalised, with any N; the output `logits` is `(N, classes)` float32.
    The file's metadata properties are `label_names` (a JSON list), `preprocessing` (JSON: input_size, crop_pct,
    crop_mode, interpolation, mean and std in timm's words), `license`, `source` and `architecture`.

    Args:
        model: The network, on the CPU.
        path: The file; if not given, it is named after the model folder and stands beside it (`RUN/model.onnx`), or
            after the Hub's repository, in the working directory.
        tolerance: Greatest relative error at which the file is written.

    Raises:
        RequestError: If the file cannot be written there, or the network is too large for one.
        RunError: If the network cannot be exported, or ONNX Runtime's logits are not torch's; no file is left.
    """
    path = _default_path(model) if path is None else path
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.network.state_dict().values())
    if size > MOST_BYTES:
        raise RequestError(f"the network has {size / 1e9:.1f} GB of weights, and an ONNX file holds at most 2 GiB")
    _check_place(path)
    content = _to_onnx(model)
    onnx.helper.set_model_props(content, _properties(model))
    serialized = content.SerializeToString()
    absolute, relative = _errors(model, serialized)
    if not relative <= tolerance:  # NaN is refused as well
        raise RunError(
            f"ONNX Runtime's logits differ from torch's by {absolute:.1e}, which is {relative:.1e} of the greatest "
            f"logit, where {tolerance:.0e} is tolerated; no file was written"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, serialized)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
    return OnnxFile(path=path, absolute_error=absolute, relative_error=relative)


def _default_path(model: TrainedModel) -> Path:
    if model.folder is not None:
        return model.folder.with_name(f"{model.folder.name}.onnx")
    repository = str(model.source.base_id).partition("@")[0]
    return Path(f"{repository.rpartition('/')[2]}.onnx")


def _check_place(path: Path) -> None:
    """Refuse a place where no file can be written; make nothing yet."""
    if path.is_dir():
        raise RequestError(f"--output {path} is a folder: expected a file, such as {path / 'model.onnx'}")
    nearest = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not nearest.is_dir():
        raise RequestError(f"{path} cannot be made, as {nearest} is a file; give another --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{path} cannot be written, for want of rights; give another --output")


def _to_onnx(model: TrainedModel) -> onnx.ModelProto:
    example = torch.zeros(2, *model.data_config["input_size"])
    try:
        # the fused attention of a CPU has strides that torch.export does not see, where a bias is added in it
        with sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                model.network,
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
    resizing = RESIZING.get(model.data_config["crop_mode"], RESIZING["center"])
    content.doc_string = (
        f"images: from a picture, {resizing}; divide by 255, subtract mean, divide by std, channels first. "
        "logits: one for each of label_names; their softmax is the probabilities. "
        "All is in the metadata properties; size is the height and width of input_size."
    )
    return content


def _forget_origin(message: Any) -> None:
    """Remove where every node comes from: it tells paths of this machine, and is half of a small file."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                _forget_origin(part)


def _properties(model: TrainedModel) -> dict[str, str]:
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return {
        "label_names": json.dumps(model.label_names, ensure_ascii=False),
        "preprocessing": json.dumps({key: model.data_config[key] for key in keys}),
        "license": model.source.base_license or "unknown",
        "source": str(model.source.base_id),
        "architecture": model.source.architecture,
    }


@torch.inference_mode()
def _errors(model: TrainedModel, content: bytes) -> tuple[float, float]:
    """Give the greatest absolute and relative error of ONNX Runtime's logits, on seeded normal noise."""
    generator = torch.Generator().manual_seed(0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    absolute, relative = [], []
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for batch_size in BATCH_SIZES:
            images = torch.randn(batch_size, *model.data_config["input_size"], generator=generator)
            expected = model.network(images)
            (found,) = session.run(["logits"], {"images": images.numpy()})
            differences = (torch.from_numpy(found) - expected).abs().amax(dim=1)
            absolute.append(differences)
            relative.append(differences / expected.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    except (
        runtime.Fail,
        runtime.InvalidArgument,
        runtime.InvalidGraph,
        runtime.NotImplemented,
        runtime.RuntimeException,
    ) as error:
        raise RunError(f"ONNX Runtime {onnxruntime.__version__} cannot run the network: {one_line(error)}") from error
    return torch.cat(absolute).max().item(), torch.cat(relative).max().item()
