"""The training view computes the model's function with the model's tensors, and stays the same for a whole run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from pytest import MonkeyPatch, fixture, mark
from support.processes import TINY, run_process
from support.runs import kill_at, lines, weights, without_clock

from resnext_hub.kernels.merged import MergedConv2d, grouped_convolutions
from resnext_hub.kernels.pointwise import PointwiseConv2d
from resnext_hub.kernels.training_view import build_training_view, choose_factors
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

GROUPED = (
    "--model", "regnetx_002", "--image-size", 32, "--mixed-precision", "no", "--batch-size", 16, "--lr", 0.01,
    "--warmup-epochs", 0, "--eval-fraction", 0.05, "--threads", 1,
)  # fmt: skip
"""Flags for a small timm model with groups of 8 channels."""


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnext29_g32_w4", num_classes=3).to(memory_format=torch.channels_last).train()


@fixture
def example() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_number_is_the_width_of_all_layers_that_divide_it(example: torch.Tensor) -> None:
    model = small_model()
    widths = {name: conv.in_channels // conv.groups for name, conv in grouped_convolutions(model).items()}
    factors = choose_factors(model, example, "16", "no")
    assert set(widths.values()) == {4, 8, 16}
    assert {name: factors.get(name, 1) * width for name, width in widths.items()} == dict.fromkeys(widths, 16)
    assert choose_factors(model, example, "off", "no") == {}


def test_a_step_of_the_training_view_has_the_gradients_and_statistics_of_the_model(example: torch.Tensor) -> None:
    found = []
    for merged in (False, True):
        model = small_model().double()
        trained = build_training_view(model, choose_factors(model, example.double(), "16", "no")) if merged else model
        torch.nn.functional.cross_entropy(trained(example.double()), torch.tensor([0, 1, 2, 0])).backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert isinstance(trained.get_submodule("layer1.0.conv2"), MergedConv2d)
    assert isinstance(trained.get_submodule("layer1.0.conv1"), PointwiseConv2d)
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)  # float64, another order of sums


def test_the_model_is_unchanged_and_shares_what_the_view_learns(example: torch.Tensor) -> None:
    model = small_model()
    view = build_training_view(model, choose_factors(model, example, "16", "no"))
    assert not any(isinstance(module, (MergedConv2d, PointwiseConv2d)) for module in model.modules())
    own, shared = model.state_dict(keep_vars=True), view.state_dict(keep_vars=True)
    assert list(own) == list(shared)
    assert all(own[name] is tensor for name, tensor in shared.items())
    view(example)
    assert model.bn1.num_batches_tracked == 1


def set_fastest(cache: Path, fastest: int) -> None:
    """Change the cached times so that one width is the fastest wherever it is possible."""
    (path,) = cache.glob("widths-*.json")
    kinds = json.loads(path.read_text())
    path.write_text(json.dumps({k: {w: 1.0 if w == str(fastest) else 9.0 for w in t} for k, t in kinds.items()}))


@mark.slow
def test_a_resumed_run_keeps_its_widths_even_if_others_are_faster_now(
    tmp_path: Path, monkeypatch: MonkeyPatch, command: Command
) -> None:
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    flags = ("train", *GROUPED, "--output-dir")
    assert command(*flags, tmp_path / "measured", "--max-steps", 1)[0] == 0
    set_fastest(tmp_path / "cache", fastest=16)
    assert command(*flags, tmp_path / "run", "--max-steps", 2)[0] == 0
    first = RunRecord.load(tmp_path / "run" / "record.json").merged_groups
    assert set(first.values()) == {2}
    set_fastest(tmp_path / "cache", fastest=32)
    assert command(*flags, tmp_path / "run", "--max-steps", 3)[0] == 0
    assert RunRecord.load(tmp_path / "run" / "record.json").merged_groups == first
    for path in (tmp_path / "cache").glob("widths-*"):
        path.unlink()
    assert command(*flags, tmp_path / "run", "--max-steps", 4)[0] == 0
    assert RunRecord.load(tmp_path / "run" / "record.json").merged_groups == first
    assert not list((tmp_path / "cache").glob("widths-*"))  # nothing was measured
    code, _, err = command(*flags, tmp_path / "run", "--max-steps", 5, "--merge-groups", "off")
    assert code == 0
    assert "weights may differ in the last bits" in err
    assert RunRecord.load(tmp_path / "run" / "record.json").merged_groups == {}


BOTH = """
import json, os, sys
from pathlib import Path
os.environ["RESNEXT_HUB_CACHE"] = sys.argv[1 + int(os.environ["RANK"])]  # as on two machines
import torch
torch.set_num_threads(1)
from resnext_hub.processes.peers import join
from resnext_hub.processes.accelerator import build_accelerator
from resnext_hub.models.lookup import build_model
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.training.state import TrainingState
folder, flags = Path(sys.argv[3]), json.loads(sys.argv[4])
plan = prepare(merge_settings(flags)[0], asked={}, output_dir=folder)
peers = join()
accelerator = build_accelerator("no", True)
model = build_model(plan.source, len(plan.splits.label_names), 0.0, 0.0)
state = TrainingState(plan, model, accelerator, peers)
found = {name: m.merge_factor for name, m in state.build_view().named_modules() if hasattr(m, "merge_factor")}
(folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
"""


@mark.slow
def test_all_processes_use_the_widths_of_the_main_process_despite_different_caches(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    caches = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(caches[0]))
    torch.set_num_threads(1)
    model = timm.create_model("regnetx_002", num_classes=10).to(memory_format=torch.channels_last)
    example = torch.zeros(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    choose_factors(model, example, "auto", "no")
    shutil.copytree(*caches)
    set_fastest(caches[0], fastest=16)
    set_fastest(caches[1], fastest=24)
    wanted = choose_factors(model, example, "auto", "no")
    (tmp_path / "both.py").write_text(BOTH)
    (tmp_path / "run").mkdir()
    words = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", "localhost:0", tmp_path / "both.py", *caches, tmp_path / "run"]
    flags = {"model": "regnetx_002", "image_size": 32, "batch_size": 16, "threads": "1"}
    done = run_process(*words, json.dumps(flags))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / "run" / f"{process}.json").read_text()) for process in (0, 1))
    assert first == second == wanted
    assert set(wanted.values()) == {2}


def test_a_killed_run_with_merged_groups_and_growing_images_resumes_bit_for_bit(
    tmp_path: Path, command: Command
) -> None:
    flags = (
        *GROUPED, "--image-size", 48, "--progressive-size", 32, "--merge-groups", 32, "--max-steps", 16,
        "--checkpoint-every", 3, "--log-samples", "--optimizer", "adamw", "--mixup", 0.2,
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command("train", *flags, "--output-dir", whole)[0] == 0
    kill_at(7, killed, *flags)
    code, _, err = command("train", *flags, "--output-dir", killed)
    assert code == 0, err
    assert "resuming from step-000000" in err
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(killed / name)) == without_clock(lines(whole / name)), name
    # trained with wider groups, evaluated with the model's own
    assert set(RunRecord.load(whole / "record.json").merged_groups.values()) == {2, 3}
    assert command("evaluate", whole)[0] == 0


@mark.parametrize(
    ("flags", "part"),
    [
        (("--merge-groups", "wide"), "--merge-groups wide: expected auto, off or a width in channels from 1 to 65,536"),
        (("--merge-groups", "0"), "--merge-groups 0: expected auto, off or a width in channels from 1 to 65,536"),
        (("--progressive-size", "64"), "--progressive-size 64"),
        (
            ("--model", "test_vit", "--image-size", "160", "--progressive-size", "128"),
            "--model test_vit does not ",
        ),
        (("--progressive-size", "16"), "--progressive-size 16 is smaller than the stride of test_resnet"),
    ],
)
def test_a_wrong_request_gets_one_line(flags: tuple[str, str], part: str, tmp_path: Path, command: Command) -> None:
    code, out, err = command("train", "--model", "test_resnet", *flags, "--output-dir", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith(f"error: {part}")
    assert not (tmp_path / "run").exists()


@mark.slow
def test_a_model_that_cannot_be_compiled_is_reported_in_one_line(tmp_path: Path) -> None:
    empty = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_process(
        "scripts/train.py", *TINY, "--max-steps", 2, "--compile", "--output-dir", tmp_path / "run", **empty
    )
    assert done.returncode == 1
    assert "error: torch.compile failed for this model" in done.stderr
    assert "rerun without --compile" in done.stderr
    assert "Traceback" not in done.stderr
