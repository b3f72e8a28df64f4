"""From a decoded picture to a normalised tensor, with timm's own transforms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from resnext_hub.errors import RequestError

Transform = Callable[[Image.Image], torch.Tensor]
"""Maps a picture to a float32 tensor `(C, H, W)`."""


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Size of the pictures and what is done to them; None takes the value of the model's pretrained_cfg."""

    image_size: int | None = None
    """Height and width of the network's input in pixels."""
    crop_pct: float | None = None
    """In evaluation, the part of the resized picture that the centre crop keeps."""
    interpolation: str | None = None
    """Interpolation of resizing, such as bilinear or bicubic."""
    mean: tuple[float, float, float] | None = None
    """Mean by which the channels are normalised, of values from 0 to 1."""
    std: tuple[float, float, float] | None = None
    """Standard deviation by which the channels are normalised."""
    scale: tuple[float, float] = (0.08, 1.0)
    """In training, least and greatest part of the picture's area in a random crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """In training, least and greatest width over height of a random crop."""
    hflip: float = 0.5
    """In training, probability of mirroring left to right."""
    color_jitter: float = 0.0
    """In training, greatest relative change of brightness, contrast and saturation."""
    auto_augment: str | None = None
    """In training, a policy in timm's notation, such as rand-m7-mstd0.5, augmix-m3 or 3a."""
    random_erasing: float = 0.0
    """In training, probability of blanking a random rectangle."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise RequestError(f"--image-size {self.image_size} is not a positive number of pixels")
        if self.crop_pct is not None and not 0.0 < self.crop_pct <= 1.0:
            raise RequestError(f"--crop-pct {self.crop_pct} is not above 0 and at most 1")
        for flag, (low, high), most in (("--scale", self.scale, 1.0), ("--ratio", self.ratio, float("inf"))):
            if not 0.0 < low <= high <= most:
                raise RequestError(f"{flag} {low} {high}: expected 0 < low <= high{' <= 1' if most == 1.0 else ''}")
        for flag, probability in (("--hflip", self.hflip), ("--random-erasing", self.random_erasing)):
            if not 0.0 <= probability <= 1.0:
                raise RequestError(f"{flag} {probability} is not a probability")
        if self.color_jitter < 0.0:
            raise RequestError(f"--color-jitter {self.color_jitter} is negative")


def published_input(config: TransformConfig, pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a published model says of its input: size, crop, interpolation, mean and std, in timm's keys.

    Evaluation uses exactly this, so that stock timm repeats a published figure.
    """
    from timm.data import resolve_data_config

    channels = pretrained_cfg["input_size"][0]
    asked: dict[str, Any] = {
        "crop_pct": config.crop_pct,
        "interpolation": config.interpolation,
        "mean": config.mean if config.mean is None or channels == 3 else config.mean[:1] * channels,
        "std": config.std if config.std is None or channels == 3 else config.std[:1] * channels,
    }
    if config.image_size is not None:
        asked["input_size"] = (channels, config.image_size, config.image_size)
    resolved: dict[str, Any] = resolve_data_config(asked, pretrained_cfg=dict(pretrained_cfg))
    return resolved


def build_eval_transform(data_config: Mapping[str, Any]) -> Transform:
    """Give timm's evaluation transform for a resolved data configuration."""
    from timm.data import create_transform

    transform: Transform = create_transform(**data_config, is_training=False)
    return transform


def build_train_transform(config: TransformConfig, data_config: Mapping[str, Any]) -> Transform:
    """Give timm's training transform: random resized crop, flip, and what else the configuration asks for."""
    from timm.data import create_transform

    try:
        transform: Transform = create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
        )
    except (AssertionError, KeyError) as error:
        raise RequestError(
            f"timm has no transform for --auto-augment {config.auto_augment}, --interpolation "
            f"{data_config['interpolation']} ({error!r}); policies look like rand-m7-mstd0.5, augmix-m3, 3a"
        ) from error
    return transform
