"""The settings of a run as keyword arguments, for type checkers and editors.

A test checks that names and types equal those of the configuration.
"""

from typing import Literal, TypedDict


class TrainSettings(TypedDict, total=False):
    """Settings by their flat names; `resnext-hub train --help` describes each of them."""

    model: str
    pretrained: bool | None
    drop_rate: float
    drop_path: float
    epochs: float
    max_steps: int | None
    batch_size: int
    repeated_augmentation: int
    micro_batch_size: int | None
    elastic: int | None
    eval_batch_size: int
    tta: Literal["none", "flip"]
    calibrate: bool
    loss: Literal["cross-entropy", "bce"] | None
    label_smoothing: float | None
    ema: float | None
    seed: int
    deterministic: bool | None
    mixed_precision: Literal["auto", "no", "bf16", "fp16"]
    merge_groups: str
    compile: bool
    progressive_size: int | None
    threads: str
    log_every: int
    eval_every: float
    log_samples: bool
    track: str | None
    dataset: str
    dataset_config: str | None
    dataset_revision: str | None
    layout: Literal["classes", "splits"] | None
    train_split: str | None
    eval_split: str | None
    test_split: str | None
    image_column: str | None
    label_column: str | None
    eval_fraction: float
    test_fraction: float
    folds: int | None
    fold: int | None
    split_seed: int
    group_duplicates: bool | None
    exclude: str | None
    max_bad_fraction: float
    streaming: bool
    shuffle_block: int
    lanes: int | None
    image_size: int | None
    crop_pct: float | None
    interpolation: str | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    alternating_flip: bool
    color_jitter: float
    auto_augment: str | None
    random_erasing: float
    mixup: float
    cutmix: float
    mix_prob: float
    workers: int | None
    decoder: Literal["auto", "simplejpeg", "pil"]
    max_image_pixels: int
    optimizer: str
    lr: float | None
    momentum: float
    weight_decay: float
    warmup_epochs: float
    clip_grad: float | None
    checkpoint_every: str
    keep_checkpoints: int
    class_weights: str
    sampling: Literal["natural", "balanced"]
    logit_adjustment: float
    best_by: Literal["top1", "macro-recall", "macro-f1", "map", "loss", "last"] | None
    freeze: str
    layer_decay: float
    head_lr: float | None
    head_epochs: float
    fit_head: bool
    average_with_start: float
    early_stopping: int | None
    early_stopping_delta: float
    push_to_hub: bool
    push_checkpoints: bool
    repo_id: str | None
    license: str | None
    private: bool
