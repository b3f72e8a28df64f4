"""The ResNeXt family for timm. Importing this package registers the variants with `timm.create_model`."""

__version__ = "0.3.0"

import importlib
from typing import TYPE_CHECKING, Any

from resnext_hub.errors import RequestError, RunError, StoppedRun
from resnext_hub.models import VARIANTS, load_weights

if TYPE_CHECKING:
    from resnext_hub.api import cross_validate, evaluate, predict, publish, train
    from resnext_hub.data.remote import RemoteImage
    from resnext_hub.inference.classifier import Classifier, from_hub, load
    from resnext_hub.inference.optimize import optimize

__all__ = [
    "VARIANTS",
    "Classifier",
    "RemoteImage",
    "RequestError",
    "RunError",
    "StoppedRun",
    "__version__",
    "cross_validate",
    "evaluate",
    "from_hub",
    "load",
    "load_weights",
    "optimize",
    "predict",
    "publish",
    "train",
]

_LAZY = {
    **dict.fromkeys(("cross_validate", "evaluate", "predict", "publish", "train"), "resnext_hub.api"),
    **dict.fromkeys(("Classifier", "from_hub", "load"), "resnext_hub.inference.classifier"),
    "RemoteImage": "resnext_hub.data.remote",
    "optimize": "resnext_hub.inference.optimize",
}
"""Public names that are imported on first use, so that importing the package stays cheap."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
