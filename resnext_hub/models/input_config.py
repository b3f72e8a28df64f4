"""The input of a model: size and preprocessing of its images, in timm's terms."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

IMAGE_MODES = {1: "L", 3: "RGB"}
"""Pillow's image mode by number of input channels."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Size and evaluation preprocessing of the images that a model takes.

    The fields have timm's names and the order in which timm resolves them.
    """

    input_size: tuple[int, int, int]
    """Channels, height and width in pixels."""
    interpolation: str
    """Resampling filter, such as `bicubic`."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels from 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels from 0 to 1."""
    crop_pct: float
    """Input size divided by the size to which an image is resized before the center crop."""
    crop_mode: str
    """`center`, `squash` or `border`; see `timm.data.create_transform`."""

    @classmethod
    def resolve(cls, pretrained_cfg: Mapping[str, Any], **overrides: Any) -> "InputConfig":
        """Resolve a model's `pretrained_cfg` with timm's defaults.

        Args:
            pretrained_cfg: timm's pretrained config of a model.
            overrides: Values by timm's keys that take precedence; None keeps the model's.
        """
        from timm.data import resolve_data_config

        return cls.from_timm(resolve_data_config(overrides, pretrained_cfg=dict(pretrained_cfg)))

    @classmethod
    def from_timm(cls, resolved: Mapping[str, Any]) -> "InputConfig":
        """Create an input config from a resolved data config of timm."""
        channels, height, width = resolved["input_size"]
        return cls(
            input_size=(channels, height, width),
            interpolation=resolved["interpolation"],
            mean=tuple(resolved["mean"]),
            std=tuple(resolved["std"]),
            crop_pct=resolved["crop_pct"],
            crop_mode=resolved["crop_mode"],
        )

    def to_timm(self) -> dict[str, Any]:
        """Return the arguments for `timm.data.create_transform`."""
        return dict(vars(self))

    def with_size(self, side: int) -> "InputConfig":
        """Return the same preprocessing for square images of another size in pixels."""
        return replace(self, input_size=(self.channels, side, side))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.input_size[0]

    @property
    def image_size(self) -> int:
        """Width in pixels; training takes square images."""
        return self.input_size[-1]

    @property
    def mode(self) -> str:
        """Pillow's mode of the images."""
        return IMAGE_MODES[self.channels]
