"""Named complete configurations: what a name stands for, as flat settings over the defaults."""

from typing import Any

QUICKSTART = "quickstart"

RECIPES: dict[str, dict[str, Any]] = {
    # Chosen by measuring on the bundled digits: at least 97 % within five minutes on two CPU cores.
    QUICKSTART: {
        "dataset": "digits",
        "model": "resnext_g32",
        "image_size": 32,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "scale": [0.7, 1.0],
        "hflip": 0.0,  # a mirrored digit is another sign
        "epochs": 10.0,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 2.0,
        "checkpoint_every": "50",
    },
    # From released weights on photographs: few epochs, mild crops, a small learning rate.
    "finetune": {
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
    # The paper's settings for ImageNet (section 4), with a cosine in place of the three drops.
    "imagenet": {
        "color_jitter": 0.4,
        "epochs": 100.0,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "label_smoothing": 0.0,
    },
}
"""Settings by the name of the recipe; flags and files go over them."""
