"""Sample order and pixels depend only on seed, epoch and index."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from pytest import TempPathFactory, fixture, mark, raises
from support.processes import write_images

from resnext_hub.data.augment import Augmentation, Augmented
from resnext_hub.data.batches import Unreadable, read_batches
from resnext_hub.data.config import DataConfig
from resnext_hub.data.decode import decode
from resnext_hub.data.loaders import TrainingSamples, build_train_loader
from resnext_hub.data.order import Order, Place, StepSampler
from resnext_hub.data.splits import load_splits
from resnext_hub.data.transforms import (
    EvalTransform,
    TransformConfig,
    draw_mix,
    erase,
    mix_pairs,
    normalize,
    resolve_input,
)
from resnext_hub.errors import RequestError
from resnext_hub.models.input_config import InputConfig

CFG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
AUGMENTED = TransformConfig(auto_augment="rand-m7-mstd0.5", random_erasing=0.5, color_jitter=0.3, mixup=0.4, cutmix=1.0)


def samples() -> TrainingSamples:
    images = load_splits(DataConfig()).train
    return TrainingSamples(images, Augmentation(AUGMENTED, resolve_input(AUGMENTED, CFG)), seed=3)


def test_every_sample_occurs_once_per_epoch_and_every_batch_is_full() -> None:
    count, batch = 10, 4
    places = [place for step in range(5) for place in Order(count, 0).step(step, batch)]
    assert len(places) == 20
    for epoch in range(2):
        assert sorted(p.sample for p in places if p.epoch == epoch) == list(range(count))
    assert [p.sample for p in places if p.epoch == 0] != [p.sample for p in places if p.epoch == 1]


def test_a_dataset_smaller_than_the_batch_still_fills_it() -> None:
    places = Order(3, 0).step(0, 8)
    assert len(places) == 8
    assert [p.epoch for p in places] == [0, 0, 0, 1, 1, 1, 2, 2]


@mark.parametrize("processes", [1, 2, 3, 4])
def test_the_processes_together_load_the_global_batch(processes: int) -> None:
    parts = [list(StepSampler(Order(50, 7), 12, 0, 10, p, processes)) for p in range(processes)]
    for step in range(10):
        whole = [place for part in parts for place in part[step]]
        assert whole == Order(50, 7).step(step, 12)


def test_resuming_means_starting_at_another_step() -> None:
    whole = list(StepSampler(Order(50, 7), 12, 0, 10))
    assert list(StepSampler(Order(50, 7), 12, 6, 10)) == whole[6:]


@fixture(scope="module")
def fifty(tmp_path_factory: TempPathFactory) -> TrainingSamples:
    """Fifty images with all random augmentations enabled."""
    root = tmp_path_factory.mktemp("images")
    for name, shade in (("a", 60), ("b", 180)):
        write_images(root / name, 25, shade)
    images = load_splits(DataConfig(dataset=str(root), eval_fraction=0.04)).train
    return TrainingSamples(images, Augmentation(AUGMENTED, resolve_input(AUGMENTED, CFG)), seed=3)


def test_an_alternating_flip_mirrors_each_image_in_every_other_epoch() -> None:
    config = TransformConfig(alternating_flip=True, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    digits = load_splits(DataConfig()).train
    samples, still = (
        TrainingSamples(digits, Augmentation(config, resolve_input(config, CFG)), seed=3)
        for config in (config, replace(config, hflip=0.0))
    )
    mirrored = 0
    for index in range(100):
        plain = still[Place(0, index, 0)].image
        first, second, third = (samples[Place(epoch, index, 0)].image for epoch in range(3))
        assert torch.equal(first, third)
        assert torch.equal(first, second.flip(-1))
        assert torch.equal(plain, first) or torch.equal(plain, second)
        assert torch.equal(samples[Place(0, index, 1)].image, second)  # repeated augmentation has both in one epoch
        mirrored += torch.equal(plain, second)
    assert 35 <= mirrored <= 65


def test_an_alternating_flip_refuses_other_probabilities() -> None:
    with raises(RequestError, match="every other epoch"):
        TransformConfig(alternating_flip=True, hflip=0.3)


BATCH, STEPS = 24, 4
"""Two epochs of the 48 training images."""


def hashes(samples: TrainingSamples, processes: int, workers: int) -> list[str]:
    """Return a hash of the mixed pixels and targets of each global batch for a number of processes."""
    part = BATCH // processes
    found = [hashlib.sha256() for _ in range(STEPS)]
    for process in range(processes):
        sampler = StepSampler(Order(len(samples.images), 3), BATCH, 0, STEPS, process, processes)
        for step, batch in enumerate(read_batches(build_train_loader(samples, sampler, workers))):
            mix = draw_mix(AUGMENTED, 3, step, range(process * part // 2, (process + 1) * part // 2), (32, 32))
            images = erase(
                normalize(batch.images, torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)), batch.erased
            )
            images, targets = mix_pairs(images, batch.labels, mix, 2)
            assert len(images) == part
            for image, target in zip(images, targets, strict=True):
                found[step].update(image.numpy().tobytes() + target.numpy().tobytes())
    return [digest.hexdigest() for digest in found]


@fixture(scope="module")
def reference(fifty: TrainingSamples) -> list[str]:
    assert len(fifty.images) * 2 == STEPS * BATCH
    found = hashes(fifty, 1, 0)
    assert len(set(found)) == STEPS
    return found


@mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
@mark.parametrize("workers", [0, 1, 2, 4])
@mark.parametrize("processes", [1, 2, 3, 4])
def test_two_epochs_have_the_same_pixels_for_any_number_of_processes_and_workers(
    fifty: TrainingSamples, reference: list[str], processes: int, workers: int
) -> None:
    assert hashes(fifty, processes, workers) == reference


def test_a_sample_is_augmented_differently_in_each_epoch() -> None:
    data = samples()
    places = [*Order(1437, 3).step(0, 1437)[:1], *Order(1437, 3).step(1, 1437)]
    first = places[0]
    again = next(p for p in places[1:] if p.sample == first.sample)
    assert not torch.equal(data[first].image, data[again].image)
    assert torch.equal(data[first].image, data[first].image)


def test_an_unreadable_sample_is_always_replaced_by_the_same_other_one(tmp_path: Path) -> None:
    for name, shade in (("a", 60), ("b", 180)):
        write_images(tmp_path / name, 10, shade)
    splits = load_splits(DataConfig(dataset=str(tmp_path), group_duplicates=False))
    unreadable = 3
    Path(splits.train.rows[int(splits.train.indices[unreadable])]["image"]["path"]).write_bytes(b"")
    transform = EvalTransform(InputConfig.resolve(CFG))
    data = TrainingSamples(splits.train, lambda row, mirrored: Augmented(transform(decode(row))), seed=0)
    first, again = data[Place(0, unreadable)], data[Place(5, unreadable)]
    assert first.unreadable == again.unreadable == [Unreadable(unreadable, splits.train.name(unreadable), "zero bytes")]
    assert first.index == unreadable
    assert torch.equal(first.image, again.image)
    twins = [
        i for i in range(len(splits.train)) if i != unreadable and torch.equal(data[Place(0, i)].image, first.image)
    ]
    assert len(twins) == 1
    assert first.label == splits.train.labels[twins[0]]


def test_evaluation_uses_timms_transform_for_the_published_configuration() -> None:
    import timm

    config = TransformConfig(image_size=48, crop_pct=0.8, interpolation="bicubic")
    resolved = resolve_input(config, CFG)
    assert resolved.input_size == (3, 48, 48)
    image = load_splits(DataConfig()).eval.image(0)
    stock = timm.data.create_transform(**resolved.to_timm())
    assert torch.equal(EvalTransform(resolved)(image), stock(image))
