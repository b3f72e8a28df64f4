"""Recipes: named sets of flat settings that override the defaults."""

import math
from dataclasses import dataclass, field
from typing import Any

from resnext_hub.errors import RequestError
from resnext_hub.settings import did_you_mean

QUICKSTART = "quickstart"
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Settings up to a number of images per class."""

    most: float
    """Training images per class, on average, up to which they apply."""
    settings: dict[str, Any]
    """Flat settings."""

    @property
    def name(self) -> str:
        """When it applies, in words."""
        return f"up to {self.most:g} training images per class" if self.most < math.inf else "more images per class"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named set of settings."""

    purpose: str
    """What it is for."""
    source: str
    """Where its settings come from, and how they differ from the source."""
    result: str
    """What is known to come out, and for what."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Flat settings that differ from the defaults."""
    tiers: tuple[Tier, ...] = ()
    """Further settings by increasing number of images per class; the first tier that applies is used."""


_RSB = {
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "batch_size": 2048,
    "optimizer": "lamb",
    "weight_decay": 0.02,
    "loss": "bce",
    "label_smoothing": 0.0,
    "warmup_epochs": 5.0,
    "mixup": 0.1,
    "cutmix": 1.0,
}
"""What the recipes of Wightman et al. (2021) have in common."""

RECIPES: dict[str, Recipe] = {
    QUICKSTART: Recipe(
        purpose="a first run on the bundled digits, in about a minute on a CPU",
        source="tuned on the bundled digits; images are not mirrored, because a mirrored digit is not a digit",
        result="98.6 to 99.2 % accuracy on 360 held-out digits, with 3 seeds",
        settings={
            "dataset": "digits",
            "model": "resnext_g32",
            "image_size": 32,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "scale": [0.7, 1.0],
            "hflip": 0.0,
            "epochs": 6.0,
            "batch_size": 64,
            "eval_batch_size": 64,
            "eval_every": 2.0,
            "optimizer": "adamw",
            "lr": 3e-3,
            "weight_decay": 0.05,
            "warmup_epochs": 0.6,
            "checkpoint_every": "50",
        },
    ),
    AUTO: Recipe(
        purpose="fine-tune pretrained weights, with a method that suits the number of images per class",
        source="Kumar et al., 2022 (arXiv 2202.10054): fit the classifier before training other layers; the "
        "limit of 100 images per class is based on our comparison on small datasets",
        result="see 'Fine-tune with few images' in the documentation",
        settings={"pretrained": True},
        tiers=(
            Tier(most=100, settings={"fit_head": True, "freeze": "head", "epochs": 0.0}),
            Tier(
                most=math.inf,
                settings={
                    "fit_head": True,
                    "scale": [0.35, 1.0],
                    "epochs": 10.0,
                    "optimizer": "adamw",
                    "lr": 2e-4,
                    "weight_decay": 0.05,
                    "warmup_epochs": 1.0,
                },
            ),
        ),
    ),
    "finetune": Recipe(
        purpose="fine-tune pretrained weights on photographs, with few epochs, mild crops and a small learning rate",
        source="common practice; AdamW with a learning rate like those used to fine-tune ConvNeXt or ViT",
        result="not measured on a public benchmark",
        settings={
            "pretrained": True,
            "scale": [0.35, 1.0],
            "color_jitter": 0.2,
            "epochs": 10.0,
            "batch_size": 64,
            "optimizer": "adamw",
            "lr": 3e-4,
            "weight_decay": 0.05,
            "warmup_epochs": 1.0,
        },
    ),
    "linear-probe": Recipe(
        purpose="train only the classifier of a pretrained model, on cached features, for very few images",
        source="Kumar et al., 2022 (arXiv 2202.10054): training all layers at once distorts pretrained features",
        result="see 'Fine-tune with few images' in the documentation",
        settings={"pretrained": True, "fit_head": True, "freeze": "head", "epochs": 0.0},
    ),
    "scratch": Recipe(
        purpose="train on photographs without pretrained weights, with many epochs and strong augmentation",
        source="Wightman et al., 2021 (arXiv 2110.00476), procedure A3, with AdamW and a small batch",
        result="not measured on a public benchmark",
        settings={
            "pretrained": False,
            "scale": [0.2, 1.0],
            "auto_augment": "rand-m6-mstd0.5-inc1",
            "mixup": 0.1,
            "cutmix": 1.0,
            "epochs": 100.0,
            "batch_size": 128,
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "warmup_epochs": 5.0,
        },
    ),
    "fast": Recipe(
        purpose="a quick look at a dataset, with few epochs and half the image size at first",
        source="progressive resizing as in Howard, 2018 (DAWNBench), with AdamW",
        result="not measured on a public benchmark",
        settings={
            "image_size": 128,
            "progressive_size": 64,
            "scale": [0.35, 1.0],
            "epochs": 6.0,
            "batch_size": 64,
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "warmup_epochs": 1.0,
        },
    ),
    "cifar": Recipe(
        purpose="ResNeXt-29 on CIFAR-10 or CIFAR-100",
        source="Xie et al., 2017 (arXiv 1611.05431), section 5.3, with warmup and a cosine schedule, and "
        "random crops of 0.6 to 1 of the area in place of padding by 4 pixels",
        result="paper: 3.65 % top-1 error on CIFAR-10 and 17.77 % on CIFAR-100 with 8x64d",
        settings={
            "model": "resnext29_g8_w64",
            "image_size": 32,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "scale": [0.6, 1.0],
            "epochs": 300.0,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 0.1,
            "weight_decay": 5e-4,
            "label_smoothing": 0.0,
        },
    ),
    "paper": Recipe(
        purpose="ImageNet as in the ResNeXt paper",
        source="Xie et al., 2017 (arXiv 1611.05431), section 4, with warmup and a cosine schedule",
        result="paper: 22.2 % top-1 error on ImageNet-1K with ResNeXt-50 (32x4d)",
        settings={
            "color_jitter": 0.4,
            "epochs": 100.0,
            "batch_size": 256,
            "optimizer": "sgd",
            "lr": 0.1,
            "weight_decay": 1e-4,
            "label_smoothing": 0.0,
        },
    ),
    "rsb-a2": Recipe(
        purpose="ImageNet, with a higher accuracy than in the ResNeXt paper; 300 epochs",
        source="Wightman et al., 2021 (arXiv 2110.00476), procedure A2",
        result="80.4 % top-1 accuracy on ImageNet-1K with ResNeXt-50 (32x4d) at 224 px",
        settings=_RSB
        | {
            "image_size": 224,
            "auto_augment": "rand-m7-mstd0.5-inc1",
            "repeated_augmentation": 3,
            "drop_path": 0.05,
            "epochs": 300.0,
            "lr": 5e-3,
        },
    ),
    "rsb-a3": Recipe(
        purpose="ImageNet at a low cost; 100 epochs at 160 px",
        source="Wightman et al., 2021 (arXiv 2110.00476), procedure A3, but evaluated at 160 px",
        result="79.3 % top-1 accuracy on ImageNet-1K with ResNeXt-50 (32x4d), evaluated at 224 px",
        settings=_RSB | {"image_size": 160, "auto_augment": "rand-m6-mstd0.5-inc1", "epochs": 100.0, "lr": 8e-3},
    ),
    "study": Recipe(
        purpose="the members of a study, with small images and a few minutes per run",
        source="Xie et al., 2017 (arXiv 1611.05431), section 5.3: SGD as for CIFAR",
        result="see the study pages in the documentation",
        settings={
            "dataset": "digits",
            "image_size": 8,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "scale": [0.7, 1.0],
            "hflip": 0.0,
            "epochs": 12.0,
            "batch_size": 64,
            "eval_batch_size": 64,
            "optimizer": "sgd",
            "lr": 0.1,
            "weight_decay": 5e-4,
            "warmup_epochs": 1.0,
            "label_smoothing": 0.0,
            "log_every": 5,
        },
    ),
}
"""Recipes by name; configuration files and flags override their settings."""

RENAMED = {"imagenet": "paper"}
"""Recipes of earlier versions and their names today."""


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        RequestError: If there is none of this name.
    """
    if name in RECIPES:
        return RECIPES[name]
    renamed = f"; {name} is now called {RENAMED[name]}" if name in RENAMED else did_you_mean(name, RECIPES)
    raise RequestError(f"does not exist; available: {', '.join(RECIPES)}{renamed}")
