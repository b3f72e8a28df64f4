"""Export to a program of torch.export, which torch loads and runs without timm or this package."""

import copy
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from resnext_hub.errors import RunError, one_line
from resnext_hub.export.parts import Part
from resnext_hub.export.runtime import Run
from resnext_hub.files import write_atomic
from resnext_hub.models.lookup import LoadedModel


class Program:
    """Parts that follow one another, exported as one when they are first used."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.metadata: dict[str, str] = {}

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        """The exported program, without local paths.

        Raises:
            RunError: If torch.export does not support the model.
        """
        first = self.parts[0]
        (axes,) = first.dynamic_axes
        shapes = ({axis: torch.export.Dim(name) for axis, name in axes.items()},)
        module = copy.deepcopy(_InTurn(self.parts)).eval().requires_grad_(False)
        try:
            program = torch.export.export(module, first.example, dynamic_shapes=shapes)
        except (RuntimeError, ValueError, TorchDynamoException) as error:
            raise RunError(f"torch.export cannot export the model: {one_line(error)}") from error
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it contains local paths
        return program


class _InTurn(nn.Module):
    """Runs parts one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.module for part in parts)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map the inputs of the first part to the outputs of the last."""
        found: tuple[torch.Tensor, ...] = (images,)
        for part in self.parts:
            result = part(*found)
            found = result if isinstance(result, tuple) else (result,)
        return found


class TorchFormat:
    """Programs of torch.export; implements `resnext_hub.export.runtime.Format`."""

    suffix = ".pt2"
    runtime = "torch.export"

    def check(self, model: LoadedModel) -> None:
        """Accept any model."""

    def build(self, part: Part) -> Program:
        """Return a part as the content of a file."""
        return Program([part])

    def join(self, contents: Sequence[Program]) -> Program:
        """Return contents that follow one another as one."""
        return Program([part for content in contents for part in content.parts])

    def describe(self, content: Program, facts: dict[str, str], text: str) -> None:
        """Set the metadata of a content."""
        content.metadata = facts | {"description": text}

    def open(self, content: Program) -> Run:
        """Return a function that runs the content, and returns its first output."""
        module = content.exported.module()
        return lambda images: module(images)[0]

    def write(self, content: Program, path: Path) -> tuple[Path, ...]:
        """Write the file atomically; return its path in a tuple."""
        buffer = io.BytesIO()
        torch.export.save(content.exported, buffer, extra_files=content.metadata)
        write_atomic(path, buffer.getvalue())
        return (path,)


FORMAT = TorchFormat()
