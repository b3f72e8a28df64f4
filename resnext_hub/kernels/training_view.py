"""The form in which a network is trained: other modules over the same parameters, which compute the same in less time.

The network itself stays as it is. It is what evaluates, is saved and published, so that nothing there depends on what
was fastest on the machine that trained it.
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
"""Type of a forward pass by its precision."""


def choose_factors(network: nn.Module, example: torch.Tensor, asked: str, precision: str) -> dict[str, int]:
    """Choose how many neighbouring groups of each grouped convolution become one; layers that stay are left out.

    Args:
        network: The network, on its device and in its memory format.
        example: Images `(N, C, H, W)` as a pass takes them.
        asked: `auto` measures forward and backward pass of each kind of layer, or remembers what was measured on this
            machine; `off` merges nothing; a number is the width for all layers.
        precision: Resolved mixed precision.
    """
    timing = TrainingTiming(AUTOCAST[precision])
    if asked == "off":
        return {}
    return factors_of(choose_widths(network, example, "measure" if asked == "auto" else int(asked), timing=timing))


def agree_on_factors(
    network: nn.Module, shape: tuple[int, ...], asked: str, precision: str, accelerator: "Accelerator"
) -> dict[str, int]:
    """Let the main process choose as `choose_factors` does, for images of a shape `(N, C, H, W)`, and tell all."""
    from accelerate.utils import broadcast_object_list

    chosen: list[dict[str, int]] = [{}]
    if accelerator.is_main_process:
        example = torch.zeros(shape, device=accelerator.device).contiguous(memory_format=torch.channels_last)
        chosen = [choose_factors(network, example, asked, precision)]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0]


def build_training_view(network: nn.Module, factors: Mapping[str, int]) -> nn.Module:
    """Give the form in which a network is trained; its parameters and buffers are the network's own.

    Args:
        network: The network; it is not changed.
        factors: By the name of a grouped convolution, how many neighbouring groups become one.
    """
    tensors = itertools.chain(network.parameters(), network.buffers())
    form = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    merge_groups(form, factors)
    if next(network.parameters()).device.type == "cpu":  # cuDNN computes them well as they are
        compute_pointwise_as_products(form)
    return form


def require_shared_tensors(form: nn.Module, network: nn.Module) -> None:
    """Check that a training form computes with the very parameters and buffers of its network.

    What wraps or moves a module may copy its tensors. The network that is evaluated and published would then keep
    the values that it was born with.

    Raises:
        RuntimeError: If a parameter or buffer of the form is none of the network's, or the other way round.
    """
    for kind, mine, own in (
        ("parameter", form.named_parameters(), network.named_parameters()),
        ("buffer", form.named_buffers(), network.named_buffers()),
    ):
        computed, published = ({id(tensor): name for name, tensor in tensors} for tensors in (mine, own))
        lost = [published[tensor] for tensor in published.keys() - computed.keys()]
        lost += [computed[tensor] for tensor in computed.keys() - published.keys()]
        if lost:
            raise RuntimeError(f"{kind} {min(lost)} is not shared between the trained module and the published model")
