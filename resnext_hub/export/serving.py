"""Model repositories of two servers: OpenVINO Model Server's for OpenVINO files, Triton's for ONNX files.

Both have a folder per model and, in it, one per version; a configuration tells the server what the model takes and
returns.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resnext_hub.errors import RequestError, setting
from resnext_hub.files import write_atomic, write_json
from resnext_hub.models.lookup import LoadedModel

Layout = Literal["ovms", "triton"]

FORMATS: dict[Layout, Literal["openvino", "onnx"]] = {"ovms": "openvino", "triton": "onnx"}
"""The format of the files in each layout."""

VERSION = "1"

MOST_IMAGES = 32
"""Largest batch that Triton puts together."""

_LABELS = "labels.txt"


def repository_path(model: LoadedModel, layout: Layout) -> Path:
    """Return where the repository of a model is written by default: next to the model folder."""
    return Path(layout) if model.folder is None else model.folder.with_name(layout)


def model_name(model: LoadedModel) -> str:
    """Return the name of a model on a server: that of its run or repository, with only letters, digits, - and _."""
    folder = model.folder
    if folder is None:
        name = str(model.source.base_id).partition("@")[0].rpartition("/")[2]
    else:
        name = folder.parent.name if folder.name == "model" else folder.name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "classifier"


def check_layout(layout: Layout, format: str, *, raw: bool) -> None:
    """Raise RequestError unless a layout can hold a format."""
    shown, expected = setting("layout", layout), FORMATS[layout]
    if format != expected:
        raise RequestError(f"{shown} needs {setting('format', expected)}")
    if raw:
        raise RequestError(f"{shown} is for files that contain the preprocessing; omit {setting('raw', True)}")


def file_in(repository: Path, layout: Layout, name: str) -> Path:
    """Return the path of the model's file in a repository."""
    return repository / name / VERSION / ("model.xml" if layout == "ovms" else "model.onnx")


def write_configuration(
    repository: Path, layout: Layout, name: str, model: LoadedModel, outputs: Sequence[str]
) -> Path:
    """Write what a server needs besides the file; return the path of its configuration.

    Args:
        repository: The model repository.
        layout: The server.
        name: Name of the model.
        model: The model.
        outputs: Names of the outputs of its file.
    """
    if layout == "ovms":
        # relative to the configuration, so that the repository can be moved
        models = [{"config": {"name": name, "base_path": name}}]
        write_json(repository / "config.json", {"model_config_list": models})
        return repository / "config.json"
    write_atomic(repository / name / _LABELS, "".join(f"{_line(label)}\n" for label in model.label_names))
    write_atomic(repository / name / "config.pbtxt", _triton(name, model, outputs))
    return repository / name / "config.pbtxt"


def _triton(name: str, model: LoadedModel, outputs: Sequence[str]) -> str:
    """Return a configuration in the text format of protobuf; the first dimension, the batch, is not listed."""
    classes = len(model.label_names)
    described = {
        "probabilities": ("TYPE_FP32", f"[ {classes} ]", f' label_filename: "{_LABELS}"'),
        "label": ("TYPE_INT64", "[ 1 ] reshape: { shape: [ ] }", ""),
        "labels": ("TYPE_BOOL", f"[ {classes} ]", ""),
        "embedding": ("TYPE_FP32", "[ -1 ]", ""),
        "ood_score": ("TYPE_FP32", "[ 1 ] reshape: { shape: [ ] }", ""),
    }
    entries = []
    for output in outputs:
        kind, dims, extra = described[output]
        entries.append(f'  {{ name: "{output}" data_type: {kind} dims: {dims}{extra} }}')
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MOST_IMAGES}",
        'input [ { name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] } ]',
        "output [",
        ",\n".join(entries),
        "]",
        "# images of equal size that arrive at the same time are classified together",
        "dynamic_batching { }",
    ]
    return "".join(f"{line}\n" for line in lines)


def _line(label: str) -> str:
    return " ".join(label.split())
