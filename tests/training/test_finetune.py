"""Only the requested parameters are trained, with the requested learning rates; kept layers do not change at all."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from pytest import approx, fixture, mark, raises
from support.processes import TINY, run_process, save_with_timm
from support.runs import kill_at, lines, weights, without_clock
from torch import nn

from resnext_hub.errors import RequestError
from resnext_hub.models.saved import classifier_names
from resnext_hub.record import RunRecord
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.finetune import FinetuneConfig, freeze, set_training
from resnext_hub.training.optim import OptimConfig, build_optimizer, set_lr
from resnext_hub.training.schedule import plan_schedule

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


@fixture(scope="module")
def start(tmp_path_factory: object) -> Path:
    """Pretrained weights for digits, in timm's layout."""
    folder = tmp_path_factory.mktemp("start") / "model"  # type: ignore[attr-defined]
    torch.manual_seed(0)
    return save_with_timm(folder, "test_resnet", 32)


@mark.parametrize(
    ("choice", "kept", "trained"),
    [
        ("none", [], ["conv1.0.weight", "fc.weight"]),
        ("head", ["conv1.0.weight", "layer4.0.bn1.bias"], ["fc.weight", "fc.bias"]),
        ("bn", ["bn1.weight", "layer1.0.bn2.bias"], ["conv1.0.weight", "fc.bias"]),
        ("1", ["conv1.0.weight", "bn1.weight"], ["layer1.0.conv1.weight"]),
        ("3", ["conv1.0.weight", "layer2.0.conv1.weight"], ["layer3.0.conv1.weight", "fc.weight"]),
    ],
)
def test_a_choice_names_the_parameters_that_are_kept(
    model: nn.Module, choice: str, kept: list[str], trained: list[str]
) -> None:
    frozen = FinetuneConfig(freeze=choice).frozen(model, head_only=False)
    assert frozen >= set(kept)
    assert not frozen & set(trained)
    head_only = FinetuneConfig().frozen(model, head_only=True)
    assert head_only == {name for name, _ in model.named_parameters()} - classifier_names(model)


def test_layers_that_are_kept_compute_as_in_evaluation() -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    freeze(model, FinetuneConfig(freeze="2").frozen(model, head_only=False))
    set_training(model)
    norms = {name: layer.training for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert {name for name, training in norms.items() if not training} == {
        name for name in norms if not name.startswith(("layer2", "layer3", "layer4"))
    }
    assert model.training
    freeze(model, FinetuneConfig(freeze="bn").frozen(model, head_only=False))
    set_training(model)
    assert not any(layer.training for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert model.layer1[0].conv1.training


@mark.parametrize(
    ("settings", "pretrained", "message"),
    [
        ({"freeze": "all"}, True, r"^freeze=all: expected none, head, bn or a number of stages"),
        ({"freeze": "0"}, True, r"^freeze=0: expected none"),
        ({"freeze": "6"}, True, r"^freeze=6: the model has only 5 stages before its classifier"),
        ({"freeze": "head"}, False, r"^freeze=head freezes layers at their initial values, which are random here"),
        ({"head_epochs": 1.0}, False, r"^head_epochs=1.0 freezes layers at their initial values"),
        ({"freeze": "head", "head_epochs": 1.0}, True, r"^head_epochs=1.0 has no effect with freeze=head"),
    ],
)
def test_an_impossible_choice_is_refused_by_name(
    model: nn.Module, settings: dict[str, object], pretrained: bool, message: str
) -> None:
    with raises(RequestError, match=message):
        FinetuneConfig(**settings).check_model(model, pretrained)  # type: ignore[arg-type]


def test_freezing_batch_norm_needs_batch_norm() -> None:
    with raises(RequestError, match="has no batch norm layers"):
        FinetuneConfig(freeze="bn").check_model(timm.create_model("test_convnext"), True)


def test_layers_have_the_rates_of_timms_layer_decay_and_the_classifier_its_own(model: nn.Module) -> None:
    config = OptimConfig(optimizer="adamw", lr=0.01)
    optimizer = build_optimizer(model, config, layer_decay=0.5, head_lr=0.3)
    set_lr(optimizer, 0.01)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(rates) == len(by_name) == len(list(model.parameters()))
    assert by_name["fc.weight"] == by_name["fc.bias"] == approx(0.3)
    expected = timm.optim.create_optimizer_v2(model, opt="adamw", lr=0.01, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in expected.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not name.startswith("fc"):
            assert by_name[name] == approx(0.01 * scales[id(parameter)]), name
    assert by_name["conv1.0.weight"] < by_name["layer4.0.conv1.weight"] < 0.01
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in ["fc.bias"]
              if any(p is model.fc.bias for p in group["params"])}  # fmt: skip
    assert decays == {"fc.bias": 0.0}


def test_the_head_steps_and_the_others_have_a_warmup_and_a_cosine_of_their_own() -> None:
    config = TrainConfig.from_flat({"epochs": 10.0, "head_epochs": 4.0, "batch_size": 10, "warmup_epochs": 1.0})
    schedule = plan_schedule(config, 100)
    assert (schedule.steps, schedule.head_steps, schedule.warmup_steps) == (100, 40, 10)
    rates = [schedule.lr_at(step, 1.0) for step in range(100)]
    assert rates[9] == rates[49] == 1.0
    assert rates[39] < 0.01
    assert rates[99] < 0.01
    assert rates[40] == approx(0.1)
    assert [schedule.head_only(step) for step in (0, 39, 40, 99)] == [True, True, False, False]
    with raises(
        RequestError, match=r"head_epochs=10.0 leaves no steps of this run for the other layers: the run has 100"
    ):
        plan_schedule(TrainConfig.from_flat({"epochs": 10.0, "head_epochs": 10.0, "batch_size": 10}), 100)


FLAGS = (*TINY, "--image-size", 32, "--batch-size", 48, "--lr", 0.02, "--eval-every", 0.5)


@mark.parametrize("choice", ["head", "bn", "3"])
def test_kept_layers_are_equal_bit_for_bit_after_training(
    start: Path, tmp_path: Path, command: Command, choice: str
) -> None:
    words = ("--model", f"local-dir:{start}", "--max-steps", 12, "--freeze", choice, "--output-dir", tmp_path / "run")
    code, _, err = command("train", *FLAGS, *words)
    assert code == 0, err
    model = timm.create_model(f"local-dir:{start}", pretrained=True, num_classes=10)
    frozen = FinetuneConfig(freeze=choice).frozen(model, head_only=False)
    before, after = model.state_dict(), weights(tmp_path / "run")
    kept = [name for name in before if name in frozen]
    statistics = [name for name in before if "running" in name and f"{name.rsplit('.', 1)[0]}.weight" in frozen]
    assert len(kept) > 5
    assert len(statistics) > 2
    for name in (*kept, *statistics):
        assert torch.equal(before[name], after[name]), name
    changed = [name for name in before if name not in frozen and name.endswith("weight")]
    assert not any(torch.equal(before[name], after[name]) for name in changed)


def test_only_the_classifier_changes_in_the_head_epochs_and_a_kill_resumes_bit_for_bit(
    start: Path, tmp_path: Path, command: Command
) -> None:
    flags = (
        *FLAGS, "--model", f"local-dir:{start}", "--max-steps", 36, "--head-epochs", 0.5, "--checkpoint-every", 5,
        "--keep-checkpoints", 9, "--log-samples", "--layer-decay", 0.7, "--head-lr", 0.1, "--ema", 0.9,
    )  # fmt: skip
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    from safetensors.torch import load_file

    first = timm.create_model(f"local-dir:{start}", pretrained=True, num_classes=10).state_dict()
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    found = {path.name: load_file(path / "model.safetensors") for path in checkpoints}
    assert torch.equal(found["step-00000015"]["layer4.0.conv1.weight"], first["layer4.0.conv1.weight"])
    assert torch.equal(found["step-00000015"]["layer1.0.bn1.running_mean"], first["layer1.0.bn1.running_mean"])
    assert not torch.equal(found["step-00000015"]["fc.weight"], first["fc.weight"])
    assert not torch.equal(found["step-00000036"]["layer4.0.conv1.weight"], first["layer4.0.conv1.weight"])
    for step in (9, 21):  # in the head epochs, and after them
        kill_at(step, tmp_path / f"killed-{step}", *flags)
        code, _, err = command("train", *flags, "--output-dir", tmp_path / f"killed-{step}")
        assert code == 0, err
        assert "resuming from step-000000" in err
        for name, tensor in weights(tmp_path / "whole").items():
            assert torch.equal(tensor, weights(tmp_path / f"killed-{step}")[name]), name
        for name in ("metrics.jsonl", "samples-0.jsonl"):
            assert without_clock(lines(tmp_path / f"killed-{step}" / name)) == without_clock(
                lines(tmp_path / "whole" / name)
            )


@mark.slow
def test_two_processes_train_the_head_first_as_one_does(start: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--model", f"local-dir:{start}", "--max-steps", 36, "--head-epochs", 0.5, "--log-every", 1)
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d")
    for name, words in (
        ("one", ("scripts/train.py",)),
        ("two", (*launch, "--rdzv_endpoint", "localhost:0", "scripts/train.py")),
    ):
        done = run_process(*words, *flags, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    losses = [
        [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("one", "two")
    ]
    # kept batch norm layers do not depend on the part of the batch that a process has
    assert losses[0][:15] == approx(losses[1][:15], rel=1e-4)
    assert losses[0][-1] == approx(losses[1][-1], rel=0.5)


def test_a_run_without_improvement_stops_early_and_is_then_finished(tmp_path: Path, command: Command) -> None:
    flags = (*FLAGS, "--epochs", 50, "--lr", 1e-7, "--early-stopping", 3, "--early-stopping-delta", 0.5)
    code, out, err = command("train", *flags, "--output-dir", tmp_path / "run")
    assert code == 0, err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    evaluations = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert len(evaluations) == 4
    assert record.stopped_early
    assert record.steps == evaluations[-1]["step"] < record.planned_steps
    assert "stopped early" in err
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"no longer improved ({record.planned_steps} steps were planned)" in card
    code, out, _ = command("train", *flags, "--output-dir", tmp_path / "run")
    assert code == 0
    assert "is already finished" in out
