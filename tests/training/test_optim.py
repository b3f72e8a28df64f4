"""The learning rate is a function of the step; an optimizer resumes from a checkpoint exactly."""

import json
from itertools import pairwise

import torch
from pytest import approx, mark, raises
from safetensors.torch import load, save

from resnext_hub.errors import RequestError
from resnext_hub.training.optim import (
    OptimConfig,
    build_optimizer,
    derive_lr,
    lr_at,
    optimizer_state,
    restore_optimizer,
    set_lr,
)


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )


def test_lr_has_linear_warmup_and_cosine_decay() -> None:
    rates = [lr_at(step, total_steps=100, warmup_steps=10, lr=0.5) for step in range(100)]
    assert rates[0] == approx(0.05)
    assert rates[9] == rates[10] == 0.5
    assert rates[55] == approx(0.25)
    assert 0 < rates[99] < 0.001
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_lr_without_warmup_starts_at_its_peak() -> None:
    assert lr_at(0, total_steps=10, warmup_steps=0, lr=0.5) == 0.5


def test_the_default_lr_of_sgd_is_that_of_the_paper_scaled_by_the_batch() -> None:
    assert derive_lr("sgd", 256, pretrained=False) == approx(0.1)
    assert derive_lr("sgd", 64, pretrained=True) == approx(0.0025)
    assert derive_lr("adamw", 512, pretrained=False) == approx(1e-3)


def test_norm_layers_and_biases_have_no_weight_decay() -> None:
    groups = build_optimizer(build_model(), OptimConfig(optimizer="sgd", lr=0.1, weight_decay=0.01)).param_groups
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in groups}
    assert set(by_decay[0.0]) == {1}
    assert set(by_decay[0.01]) == {2, 4}


@mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsproptf", "nadamw"])
def test_a_restored_optimizer_takes_the_same_steps(name: str) -> None:
    images, config = torch.randn(4, 3, 8, 8), OptimConfig(optimizer=name, lr=0.01, weight_decay=0.02)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    one = build_model().to(memory_format=torch.channels_last)
    first = build_optimizer(one, config)
    for lr in (0.01, 0.02):
        step(one, first, lr)
    tensors, facts = optimizer_state(first)
    tensors, facts = load(save({k: v.contiguous() for k, v in tensors.items()})), json.loads(json.dumps(facts))

    two = build_model().to(memory_format=torch.channels_last)
    two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    second = build_optimizer(two, config)
    restore_optimizer(second, tensors, facts)
    for lr in (0.03, 0.01):
        step(one, first, lr)
        step(two, second, lr)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_step_equals_that_of_timm_and_is_not_used_with_scaled_gradients(name: str) -> None:
    """The model is channels_last, so gradients and moments need the memory format of the parameters."""
    from timm.optim import create_optimizer_v2

    found = []
    for fused in (True, False):
        model = build_model().to(memory_format=torch.channels_last)
        model[0].bias = None  # batch norm cancels it, so its gradient is noise, which adamw would amplify
        if fused:
            optimizer = build_optimizer(model, OptimConfig(optimizer=name, lr=0.01, weight_decay=0.02))
        else:
            optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.02, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
            optimizer.step()
        assert bool(optimizer.param_groups[0].get("fused")) is fused
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # rounding differs
    scaled = build_optimizer(build_model(), OptimConfig(optimizer=name, lr=0.01), scaled=True)
    assert not scaled.param_groups[0].get("fused")  # a fused step that overflows is skipped without being counted


def test_an_unknown_optimizer_is_refused_with_similar_names() -> None:
    with raises(RequestError, match=r"optimizer=adamv is not a timm optimizer; did you mean .*adam"):
        OptimConfig(optimizer="adamv")
