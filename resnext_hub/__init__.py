"""The ResNeXt family for timm. Importing this package registers the variants with `timm.create_model`."""

__version__ = "0.1.0"

from resnext_hub.models import VARIANTS, load_weights

__all__ = ["VARIANTS", "__version__", "load_weights"]
