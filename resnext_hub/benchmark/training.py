"""Optimizer steps, beside their peers."""

from dataclasses import dataclass

from resnext_hub.benchmark.contest import Contest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str = "resnext_g32"
    """A name that timm knows."""
    image_size: int = 64
    """Height and width of the pictures in pixels."""
    batch_size: int = 64
    """Pictures of an optimizer step."""


def measure(settings: Settings, rounds: int) -> Contest:
    """Let all contenders do the work by turns."""
    raise NotImplementedError
