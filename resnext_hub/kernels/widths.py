"""To which width the groups of a convolution are merged: measured on the machine at hand, and remembered there.

The width that is fastest depends on the shape, the type and the processor in ways that no rule foretells. So each kind
of layer is timed at every width, by turns; what was found is kept in the user's cache folder, so that the next run on
the same machine chooses alike without measuring.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import nn

from resnext_hub.files import write_atomic
from resnext_hub.kernels.merged import check_factors, dense_form, grouped_convolutions, merge_factors, replace_module
from resnext_hub.kernels.timing import ForwardTiming, Layer, Timing, casting
from resnext_hub.machine import processor_name

_logger = logging.getLogger(__name__)

MARGIN = 0.97
"""A merged width is taken if its time is below this part of the grouped one's: less is noise."""

TABLE: Mapping[tuple[str, torch.dtype], Mapping[int, int]] = {
    ("cpu", torch.bfloat16): {4: 32, 8: 32, 16: 32},
    ("cpu", torch.float32): {4: 8},
}
"""Widths found fastest on a CPU with matrix units, by device, type and width: for where nothing is measured."""

Merge = Literal["measure", "table", "off"] | int | Mapping[str, int]
"""How widths are chosen; see `choose_widths`."""

Source = Literal["measured", "remembered", "table", "asked"]


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What was chosen for one grouped convolution."""

    name: str
    input_shape: tuple[int, ...]
    width: int
    """Channels of a group as the network has it."""
    merged_width: int
    """Channels of a group as it is computed."""
    milliseconds: dict[int, float]
    """Median time by width; empty where nothing was measured."""
    source: Source


def choose_widths(
    model: nn.Module,
    example: torch.Tensor,
    merge: Merge,
    *,
    timing: "Timing | None" = None,
) -> tuple[LayerChoice, ...]:
    """Choose a width for each grouped convolution of a network; the network is left as it is.

    Args:
        model: Any network, with the device, type and memory format that it will compute with.
        example: Images `(N, C, H, W)` as they will come.
        merge: `measure` takes what is fastest here; `table` what was fastest on another machine, without measuring;
            a number is the greatest width for all layers; a mapping gives the factor for layers by name; `off` gives
            nothing.
        timing: How layers are timed; a forward pass of torch if not given.

    Raises:
        ValueError: If a mapping names no grouped convolution, or its factor does not divide the groups.
    """
    if merge == "off":
        return ()
    timing = timing or ForwardTiming()
    convolutions = grouped_convolutions(model)
    if isinstance(merge, Mapping):
        check_factors(convolutions, merge)
    inputs = _layer_inputs(model, convolutions, example, timing.autocast)
    layers = [Layer(name, conv, inputs[name]) for name, conv in convolutions.items() if name in inputs]
    times, known = _times_of_kinds(layers, timing) if merge == "measure" else ({}, set())
    choices = []
    for layer in layers:
        width, milliseconds = layer.width, dict[int, float]()
        source: Source
        if merge == "measure":
            kind = _kind(layer, timing)
            milliseconds, source = times[kind], "remembered" if kind in known else "measured"
            best = min(milliseconds, key=milliseconds.__getitem__, default=width)
            merged = best if best != width and milliseconds[best] < MARGIN * milliseconds[width] else width
        elif isinstance(merge, Mapping):
            merged, source = width * merge.get(layer.name, 1), "asked"
        elif merge == "table":
            row = TABLE.get((example.device.type, timing.autocast or layer.input.dtype), {})
            merged, source = _greatest_width(layer, row.get(width, width)), "table"
        else:
            merged, source = _greatest_width(layer, int(merge)), "asked"
        choices.append(
            LayerChoice(
                name=layer.name,
                input_shape=tuple(layer.input.shape),
                width=width,
                merged_width=merged,
                milliseconds=milliseconds,
                source=source,
            )
        )
    return tuple(choices)


def merge_layers(
    model: nn.Module, example: torch.Tensor, merge: Merge, timing: Timing | None = None
) -> tuple[LayerChoice, ...]:
    """Merge groups in place, for weights that no longer change; return the choice for each grouped convolution."""
    convolutions = grouped_convolutions(model)
    choices = choose_widths(model, example, merge, timing=timing)
    for name, factor in factors_of(choices).items():
        replace_module(model, name, dense_form(convolutions[name], factor))
    return choices


def list_widths(widths: Iterable[tuple[str, int, int]]) -> str:
    """Give layers, their width and their merged width in words, for those where it is another one."""
    changes: dict[str, list[str]] = {}
    for name, width, merged in widths:
        if merged != width:
            changes.setdefault(f"{width} -> {merged}", []).append(name)
    return "; ".join(f"{change}: {', '.join(names)}" for change, names in changes.items())


def factors_of(choices: Iterable[LayerChoice]) -> dict[str, int]:
    """Give how many groups become one, by the name of the layer, for those where it is more than one."""
    return {
        choice.name: choice.merged_width // choice.width for choice in choices if choice.merged_width > choice.width
    }


def cache_file(device: torch.device) -> Path:
    """Give the file that remembers what was measured on a device with as many threads and this torch."""
    root = os.environ.get("RESNEXT_HUB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "resnext_hub")
    machine = f"{processor_name(device)}-{torch.get_num_threads()}-threads-torch-{torch.__version__}"
    return Path(os.path.expanduser(root)) / f"widths-{re.sub(r'[^A-Za-z0-9.]+', '-', machine)}.json"


def _times_of_kinds(layers: Sequence[Layer], timing: Timing) -> tuple[dict[str, dict[int, float]], set[str]]:
    """Give the times of each kind of layer, measured once or remembered, and which were remembered."""
    if not layers:
        return {}, set()
    path = cache_file(layers[0].input.device)
    possible = {_kind(layer, timing): {k * layer.width for k in merge_factors(layer.conv)} for layer in layers}
    own = {_kind(layer, timing): layer.width for layer in layers}
    times = {
        kind: found
        for kind, found in _remembered(path).items()
        if kind in possible and own[kind] in found and found.keys() <= possible[kind]
    }
    known = set(times)
    new = {_kind(layer, timing): layer for layer in layers if _kind(layer, timing) not in known}
    if new:
        found = dict(zip(new, timing.times(list(new.values())), strict=True))
        _remember(path, found)
        times |= found
    return times, known


def _kind(layer: Layer, timing: Timing) -> str:
    conv, x = layer.conv, layer.input
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = "channels last" if last else "channels first"
    numbers = (conv.out_channels, conv.groups, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return json.dumps([timing.key, str(x.dtype), layout, tuple(x.shape), *numbers])


def _layer_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], example: torch.Tensor, autocast: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Give what comes to each layer, in evaluation mode, so that nothing in the network changes."""
    inputs: dict[str, torch.Tensor] = {}
    alike: dict[tuple[object, ...], torch.Tensor] = {}  # one of a sort is enough to hold
    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:

        def set_back() -> None:
            for module, training in modes.items():
                module.training = training

        stack.callback(set_back)
        for name, module in modules.items():

            def note(module: nn.Module, arguments: tuple[torch.Tensor, ...], name: str = name) -> None:
                x = arguments[0]
                inputs[name] = alike.setdefault((x.shape, x.stride(), x.dtype), x)

            stack.callback(module.register_forward_pre_hook(note).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(casting(example.device, autocast))
        model.eval()(example)
    return inputs


def _greatest_width(layer: Layer, most: int) -> int:
    """Give the greatest width to which groups can be merged, up to one that is asked for."""
    factors = merge_factors(layer.conv, most)
    return max((factor * layer.width for factor in factors if factor * layer.width <= most), default=layer.width)


def _remembered(path: Path) -> dict[str, dict[int, float]]:
    try:
        content: dict[str, dict[str, float]] = json.loads(path.read_text("utf-8"))
        return {kind: {int(w): float(t) for w, t in times.items()} for kind, times in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _logger.info("%s is of no use (%s); measuring anew", path.name, error)
        return {}


def _remember(path: Path, times: Mapping[str, Mapping[int, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=10):  # other processes remember theirs
            write_atomic(path, json.dumps({**_remembered(path), **times}, indent=1))
    except OSError as error:
        _logger.info("what was measured cannot be kept (%s); it will be measured again", error.strerror or error)
