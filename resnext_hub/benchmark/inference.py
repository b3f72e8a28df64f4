"""A network's forward pass, beside its peers."""

from dataclasses import dataclass

from resnext_hub.benchmark.contest import Contest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str = "resnext_g32"
    """A name that timm knows; its weights are seeded, as no figure depends on them."""
    image_size: int = 224
    """Height and width of the pictures in pixels."""
    batch_size: int = 16
    """Pictures computed at once."""


def measure(settings: Settings, rounds: int) -> Contest:
    """Let all contenders do the work by turns."""
    raise NotImplementedError
