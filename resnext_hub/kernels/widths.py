"""Choose the width to which the groups of each convolution are merged, by timing them on this machine.

The fastest width depends on shape, type and processor in ways that no rule predicts. So each kind of layer is timed at
every width, interleaved. The times are kept in the user's cache folder, so the next run on the same machine makes the
same choice without measuring.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import nn

from resnext_hub.files import write_atomic
from resnext_hub.kernels.merged import check_factors, grouped_convolutions, merge_conv, merge_factors, replace_module
from resnext_hub.kernels.timing import ForwardTiming, Layer, Timing, casting
from resnext_hub.machine import cache_folder, processor_name

_logger = logging.getLogger(__name__)

MARGIN = 0.97
"""A merged width is used if its time is below this fraction of the original's; a smaller gain is noise."""

TABLE: Mapping[tuple[str, torch.dtype], Mapping[int, int]] = {
    ("cpu", torch.bfloat16): {4: 32, 8: 32, 16: 32},
    ("cpu", torch.float32): {4: 8},
}
"""Fastest widths on a CPU with matrix units, by device, type and original width, for use without measuring."""

Merge = Literal["measure", "table", "off"] | int | Mapping[str, int]
"""How widths are chosen; see `choose_widths`."""

Source = Literal["measured", "remembered", "table", "asked"]


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The width chosen for a grouped convolution."""

    name: str
    input_shape: tuple[int, ...]
    width: int
    """Input channels per group in the model."""
    merged_width: int
    """Input channels per group in the computation."""
    milliseconds: dict[int, float]
    """Median time by width; empty if nothing was measured."""
    source: Source


def choose_widths(
    model: nn.Module,
    example: torch.Tensor,
    merge: Merge,
    *,
    timing: "Timing | None" = None,
) -> tuple[LayerChoice, ...]:
    """Choose a width for each grouped convolution of a model, which is not changed.

    Args:
        model: Any model, on its final device and in its final type and memory format.
        example: Representative images `(N, C, H, W)`.
        merge: `measure` chooses the fastest width on this machine; `table` the fastest on another machine, without
            measuring; a number is the largest width for all layers; a mapping has the factors of layers by name;
            `off` returns no choices.
        timing: How to time layers; the forward pass of torch if not given.

    Raises:
        ValueError: If a mapping names a layer that is not a grouped convolution, or a factor does not divide its
            groups.
    """
    if merge == "off":
        return ()
    timing = timing or ForwardTiming()
    convolutions = grouped_convolutions(model)
    if isinstance(merge, Mapping):
        check_factors(convolutions, merge)
    inputs = _layer_inputs(model, convolutions, example, timing.autocast)
    layers = [Layer(name, conv, inputs[name]) for name, conv in convolutions.items() if name in inputs]
    times, cached = _times_by_kind(layers, timing) if merge == "measure" else ({}, set())
    choices = []
    for layer in layers:
        width, milliseconds = layer.width, dict[int, float]()
        source: Source
        if merge == "measure":
            kind = _kind(layer, timing)
            milliseconds, source = times[kind], "remembered" if kind in cached else "measured"
            best = min(milliseconds, key=milliseconds.__getitem__, default=width)
            merged = best if best != width and milliseconds[best] < MARGIN * milliseconds[width] else width
        elif isinstance(merge, Mapping):
            merged, source = width * merge.get(layer.name, 1), "asked"
        elif merge == "table":
            row = TABLE.get((example.device.type, timing.autocast or layer.input.dtype), {})
            merged, source = _largest_width(layer, row.get(width, width)), "table"
        else:
            merged, source = _largest_width(layer, int(merge)), "asked"
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
    """Merge groups in place, for inference with fixed weights; return the choice for each grouped convolution."""
    convolutions = grouped_convolutions(model)
    choices = choose_widths(model, example, merge, timing=timing)
    for name, factor in factors_of(choices).items():
        replace_module(model, name, merge_conv(convolutions[name], factor))
    return choices


def list_widths(widths: Iterable[tuple[str, int, int]]) -> str:
    """Return a text that lists layers with their width and merged width, for those where they differ."""
    changes: dict[str, list[str]] = {}
    for name, width, merged in widths:
        if merged != width:
            changes.setdefault(f"{width} -> {merged}", []).append(name)
    return "; ".join(f"{change}: {', '.join(names)}" for change, names in changes.items())


def factors_of(choices: Iterable[LayerChoice]) -> dict[str, int]:
    """Return the number of groups to merge into one by layer, where it is more than one."""
    return {
        choice.name: choice.merged_width // choice.width for choice in choices if choice.merged_width > choice.width
    }


def cache_file(device: torch.device) -> Path:
    """Return the file that caches times for a device, the number of threads and the version of torch."""
    machine = f"{processor_name(device)}-{torch.get_num_threads()}-threads-torch-{torch.__version__}"
    return cache_folder() / f"widths-{re.sub(r'[^A-Za-z0-9.]+', '-', machine)}.json"


def _times_by_kind(layers: Sequence[Layer], timing: Timing) -> tuple[dict[str, dict[int, float]], set[str]]:
    """Return the times of each kind of layer, measured once or cached, and which kinds were cached."""
    if not layers:
        return {}, set()
    path = cache_file(layers[0].input.device)
    possible = {_kind(layer, timing): {k * layer.width for k in merge_factors(layer.conv)} for layer in layers}
    own = {_kind(layer, timing): layer.width for layer in layers}
    times = {
        kind: found
        for kind, found in _read_cache(path).items()
        if kind in possible and own[kind] in found and found.keys() <= possible[kind]
    }
    cached = set(times)
    new = {_kind(layer, timing): layer for layer in layers if _kind(layer, timing) not in cached}
    if new:
        found = dict(zip(new, timing.times(list(new.values())), strict=True))
        _update_cache(path, found)
        times |= found
    return times, cached


def _kind(layer: Layer, timing: Timing) -> str:
    conv, x = layer.conv, layer.input
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = "channels last" if last else "channels first"
    numbers = (conv.out_channels, conv.groups, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return json.dumps([timing.key, str(x.dtype), layout, tuple(x.shape), *numbers])


def _layer_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], example: torch.Tensor, autocast: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the input of each layer, from a pass in evaluation mode that leaves the model unchanged."""
    inputs: dict[str, torch.Tensor] = {}
    shared: dict[tuple[object, ...], torch.Tensor] = {}  # keeps one tensor per shape, layout and type
    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:

        def restore_modes() -> None:
            for module, training in modes.items():
                module.training = training

        stack.callback(restore_modes)
        for name, module in modules.items():

            def record(module: nn.Module, arguments: tuple[torch.Tensor, ...], name: str = name) -> None:
                x = arguments[0]
                inputs[name] = shared.setdefault((x.shape, x.stride(), x.dtype), x)

            stack.callback(module.register_forward_pre_hook(record).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(casting(example.device, autocast))
        model.eval()(example)
    return inputs


def _largest_width(layer: Layer, limit: int) -> int:
    """Return the largest width up to a limit to which the groups of a layer can be merged."""
    factors = merge_factors(layer.conv, limit)
    return max((factor * layer.width for factor in factors if factor * layer.width <= limit), default=layer.width)


def _read_cache(path: Path) -> dict[str, dict[int, float]]:
    try:
        content: dict[str, dict[str, float]] = json.loads(path.read_text("utf-8"))
        return {kind: {int(w): float(t) for w, t in times.items()} for kind, times in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _logger.info("ignoring the cache file %s (%s); measuring again", path.name, error)
        return {}


def _update_cache(path: Path, times: Mapping[str, Mapping[int, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=10):  # other processes update it as well
            write_atomic(path, json.dumps({**_read_cache(path), **times}, indent=1))
    except OSError as error:
        _logger.info("cannot cache the measured times (%s); the next run measures again", error.strerror or error)
