"""Recipes: named sets of flat settings that override the defaults."""

from typing import Any

QUICKSTART = "quickstart"

RECIPES: dict[str, dict[str, Any]] = {
    # Tuned on the bundled digits: accuracy of at least 97 % within five minutes on two CPU cores.
    QUICKSTART: {
        "dataset": "digits",
        "model": "resnext_g32",
        "image_size": 32,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "scale": [0.7, 1.0],
        "hflip": 0.0,  # a mirrored digit is not a digit
        "epochs": 10.0,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 2.0,
        "checkpoint_every": "50",
    },
    # For pretrained weights and photographs: few epochs, mild crops, a small learning rate.
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
    # Members of a study: SGD as in the paper (section 5.3), for small images and a few minutes per run.
    "study": {
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
    # The paper's settings for ImageNet (section 4), with a cosine schedule in place of its three steps.
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
"""Settings by recipe name; configuration files and flags override them."""
