"""The models. Importing this package registers every variant with timm."""

from resnext_hub.models.resnext import VARIANTS, Bottleneck, ResNeXt, StockArchitecture, Variant, stock_architecture
from resnext_hub.models.weights import load_weights

__all__ = [
    "VARIANTS",
    "Bottleneck",
    "ResNeXt",
    "StockArchitecture",
    "Variant",
    "load_weights",
    "stock_architecture",
]
