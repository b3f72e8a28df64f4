"""The ResNeXt family for timm. Importing this package registers the variants with `timm.create_model`."""

__version__ = "0.2.0"

from typing import Any

from resnext_hub.models import VARIANTS, load_weights

__all__ = ["VARIANTS", "__version__", "from_hub", "load_weights", "optimize"]


def __getattr__(name: str) -> Any:
    """Load what few need when it is asked for, so that importing the package stays cheap."""
    if name == "from_hub":
        from resnext_hub.hub.load import from_hub

        return from_hub
    if name == "optimize":
        from resnext_hub.inference.optimize import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
