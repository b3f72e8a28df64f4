"""How a pair of the global batch is mixed depends only on (seed, step, pair)."""

import torch
from pytest import approx, mark, raises

from resnext_hub.data.transforms import TransformConfig, draw_mix, mix_pairs
from resnext_hub.errors import RequestError

LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 3, 0])


def some_images() -> torch.Tensor:
    return torch.rand(8, 3, 20, 30, generator=torch.Generator().manual_seed(0))


def test_mixup_blends_images_and_labels_with_the_same_weight() -> None:
    images = some_images()
    mix = draw_mix(TransformConfig(mixup=0.4), 0, 7, range(4), (20, 30))
    mixed, targets = mix_pairs(images, LABELS, mix, 4)
    for i in range(8):
        share, other = float(mix.share[i // 2]), i ^ 1
        assert 0.0 < share < 1.0
        torch.testing.assert_close(mixed[i], images[i] * share + images[other] * (1 - share))
        expected = torch.zeros(4)
        expected[LABELS[i]] += share
        expected[LABELS[other]] += 1 - share
        torch.testing.assert_close(targets[i], expected)


def test_cutmix_exchanges_a_rectangle_and_weights_labels_by_its_area() -> None:
    images = some_images()
    mix = draw_mix(TransformConfig(cutmix=1.0), 0, 7, range(4), (20, 30))
    mixed, targets = mix_pairs(images, LABELS, mix, 4)
    changed = (mixed != images).any(dim=1)
    assert changed.any()
    for i in range(8):
        top, bottom, left, right = mix.boxes[i // 2].tolist()
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 30
        assert torch.equal(mixed[i, :, top:bottom, left:right], images[i ^ 1, :, top:bottom, left:right])
        assert int(changed[i].sum()) == (bottom - top) * (right - left)
        assert float(mix.share[i // 2]) == approx(1 - int(changed[i].sum()) / 600)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_mixup_and_cutmix_alternate_and_mix_prob_leaves_pairs_unmixed() -> None:
    mix = draw_mix(TransformConfig(mixup=1.0, cutmix=1.0, mix_prob=0.5), 0, 0, range(400), (20, 30))
    cut = mix.boxes[:, 1] > mix.boxes[:, 0]
    alone = (mix.share == 1.0) & ~cut
    assert 150 < int(alone.sum()) < 250
    assert 60 < int(cut.sum()) < 140
    images, labels = some_images(), LABELS
    left_alone = draw_mix(TransformConfig(mixup=1.0, mix_prob=1e-12), 0, 0, range(4), (20, 30))
    mixed, targets = mix_pairs(images, labels, left_alone, 4)
    assert torch.equal(mixed, images)
    assert torch.equal(targets.argmax(1), labels)


def test_mixing_of_a_pair_depends_on_seed_and_step_but_not_on_the_process() -> None:
    config = TransformConfig(mixup=0.3, cutmix=1.0)
    whole = draw_mix(config, 5, 3, range(8), (20, 30))
    part = draw_mix(config, 5, 3, range(4, 8), (20, 30))
    assert torch.equal(whole.share[4:], part.share)
    assert torch.equal(whole.boxes[4:], part.boxes)
    for other in (draw_mix(config, 5, 4, range(8), (20, 30)), draw_mix(config, 6, 3, range(8), (20, 30))):
        assert not torch.equal(whole.share, other.share)


@mark.parametrize("wrong", [{"mixup": -0.1}, {"cutmix": float("inf")}, {"mix_prob": 1.5}])
def test_mixing_settings_out_of_range_raise_an_error(wrong: dict[str, float]) -> None:
    with raises(RequestError, match=r"^(mix|cutmix)"):
        TransformConfig(**wrong)
