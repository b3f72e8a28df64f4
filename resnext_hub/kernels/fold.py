"""Fold the batch norms of a trained model into the preceding convolutions."""

import copy
import logging
from collections import Counter

from timm.layers import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnext_hub.kernels.merged import replace_module

_logger = logging.getLogger(__name__)


class _Tracer(fx.Tracer):
    """Treats layers as leaves, including timm's batch norms with an activation."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Return whether a module is a single node of the graph."""
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(module, name)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold each batch norm into the convolution whose only consumer it is, in place; return how many were folded.

    A batch norm with an activation, as in timm, leaves the activation. Layers stay unchanged if they are used twice,
    their parameters are read elsewhere, they have hooks, or they are other subclasses. So does a model that cannot be
    traced.
    """
    try:
        graph = _Tracer().trace(_without_hooks(model))
    except (TypeError, RuntimeError, ValueError, fx.proxy.TraceError) as error:
        _logger.info("batch norms are not folded: the model cannot be traced (%s)", error)
        return 0
    modules = dict(model.named_modules(remove_duplicate=False))
    names = Counter(id(module) for module in modules.values())
    uses = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    # reading a parameter directly is another use of its layer
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
    """Return a copy without hooks: they expect tensors, and tracing passes proxies."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied
