"""Batch norms of a trained network folded into the convolutions before them."""

import copy
import logging
from collections import Counter

from timm.layers import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnext_hub.kernels.merged import replace_module

_logger = logging.getLogger(__name__)


class _Tracer(fx.Tracer):
    """Keeps layers whole, also those subclasses of batch norm that carry an activation."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Say whether a module is one node of the graph."""
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(module, name)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold each batch norm that follows a convolution alone into it, in place; give their number.

    A batch norm with an activation of its own, as timm has them, leaves that activation. Layers that are used twice,
    whose parameters are read elsewhere, that have hooks, or that are subclasses of one's own stay as they are; so does
    a network that cannot be traced.
    """
    try:
        graph = _Tracer().trace(_without_hooks(model))
    except (TypeError, RuntimeError, ValueError, fx.proxy.TraceError) as error:
        _logger.info("batch norms stay: the network cannot be traced (%s)", error)
        return 0
    modules = dict(model.named_modules(remove_duplicate=False))
    names = Counter(id(module) for module in modules.values())
    uses = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    # a parameter that is read by itself counts as another use of its layer
    uses.update(id(modules[str(node.target).rpartition(".")[0]]) for node in graph.nodes if node.op == "get_attr")
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        norm, conv = modules[str(node.target)], modules[str(before.target)]
        if type(conv) is not nn.Conv2d or type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            continue
        if norm.running_mean is None or any(
            uses[id(part)] != 1 or names[id(part)] != 1 or _has_hooks(part) for part in (norm, conv)
        ):
            continue
        replace_module(model, str(before.target), fuse_conv_bn_eval(conv, norm))
        replace_module(model, str(node.target), getattr(norm, "act", nn.Identity()))
        folded += 1
    return folded


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _without_hooks(model: nn.Module) -> nn.Module:
    """Give a copy that calls no hooks: they are made for tensors, and tracing has none."""
    silent = copy.deepcopy(model)
    for module in silent.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return silent
