"""The training view of a model: faster modules over the same parameters.

The model itself is unchanged. It is the one that is evaluated, saved and published, so nothing published depends on
what was fastest on the training machine.
"""

import copy
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from resnext_hub.kernels.merged import merge_groups
from resnext_hub.kernels.pointwise import compute_pointwise_as_products
from resnext_hub.kernels.timing import TrainingTiming
from resnext_hub.kernels.widths import choose_widths, factors_of

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast type by mixed precision."""


def choose_factors(model: nn.Module, example: torch.Tensor, merge: str, precision: str) -> dict[str, int]:
    """Return the number of neighboring groups to merge, by layer, for each convolution where it is more than one.

    Args:
        model: The model, on its device and in its memory format.
        example: Images `(N, C, H, W)` with the shape of a training step.
        merge: `auto` times forward and backward pass of each kind of layer, unless this machine's cache has the times;
            `off` merges nothing; a number is the width for all layers.
        precision: Resolved mixed precision.
    """
    timing = TrainingTiming(AUTOCAST[precision])
    if merge == "off":
        return {}
    return factors_of(choose_widths(model, example, "measure" if merge == "auto" else int(merge), timing=timing))


def agree_on_factors(
    model: nn.Module, shape: tuple[int, ...], merge: str, precision: str, accelerator: "Accelerator"
) -> dict[str, int]:
    """Run `choose_factors` in the main process, for images of a shape `(N, C, H, W)`, and broadcast the result."""
    from accelerate.utils import broadcast_object_list

    chosen: list[dict[str, int]] = [{}]
    if accelerator.is_main_process:
        example = torch.zeros(shape, device=accelerator.device).contiguous(memory_format=torch.channels_last)
        chosen = [choose_factors(model, example, merge, precision)]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0]


def build_training_view(model: nn.Module, factors: Mapping[str, int]) -> nn.Module:
    """Return the training view of a model, which shares the model's parameters and buffers.

    Args:
        model: The model; it is not changed.
        factors: Number of neighboring groups to merge into one, by the name of a grouped convolution.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    view = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    merge_groups(view, factors)
    if next(model.parameters()).device.type == "cpu":  # cuDNN's 1x1 convolutions are fast
        compute_pointwise_as_products(view)
    return view


def require_shared_tensors(view: nn.Module, model: nn.Module) -> None:
    """Check that a training view shares all parameters and buffers with its model.

    Wrapping or moving a module may copy its tensors. The model that is evaluated and published would then keep its
    initial values.

    Raises:
        RuntimeError: If a parameter or buffer is not shared.
    """
    for kind, of_view, of_model in (
        ("parameter", view.named_parameters(), model.named_parameters()),
        ("buffer", view.named_buffers(), model.named_buffers()),
    ):
        trained, published = ({id(tensor): name for name, tensor in tensors} for tensors in (of_view, of_model))
        unshared = [published[tensor] for tensor in published.keys() - trained.keys()]
        unshared += [trained[tensor] for tensor in trained.keys() - published.keys()]
        if unshared:
            raise RuntimeError(
                f"{kind} {min(unshared)} is not shared between the trained module and the published model"
            )
