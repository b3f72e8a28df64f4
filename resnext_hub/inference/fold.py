"""Batch norms of a trained network folded into the convolutions before them."""

import logging

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnext_hub.models.merged import replace_module

_logger = logging.getLogger(__name__)


class _Tracer(fx.Tracer):
    """Keeps layers whole, also those subclasses of batch norm that carry an activation."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Say whether a module is one node of the graph."""
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(module, name)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold each batch norm that follows a convolution alone into it, in place; give their number.

    A batch norm with an activation of its own, as timm has them, leaves that activation. A network that cannot be
    traced is left as it is.
    """
    try:
        graph = _Tracer().trace(model)
    except (TypeError, RuntimeError, ValueError, fx.proxy.TraceError) as error:
        _logger.info("batch norms stay: the network cannot be traced (%s)", error)
        return 0
    modules = dict(model.named_modules())
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        norm, conv = modules[str(node.target)], modules[str(before.target)]
        if type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        replace_module(model, str(before.target), fuse_conv_bn_eval(conv, norm))
        replace_module(model, str(node.target), getattr(norm, "act", nn.Identity()))
        folded += 1
    return folded
