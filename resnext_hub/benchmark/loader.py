"""Pictures from encoded bytes to training batches, beside their peers."""

from dataclasses import dataclass

from resnext_hub.benchmark.contest import Contest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    image_size: int = 224
    """Height and width of the network's input in pixels."""
    workers: int = 1
    """Reading processes."""


def measure(settings: Settings, rounds: int) -> Contest:
    """Let all contenders do the work by turns."""
    raise NotImplementedError
