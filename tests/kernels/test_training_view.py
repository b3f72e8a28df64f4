"""A network is trained in another form: the same function of the same tensors, chosen once for all of a run."""

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
"""Flags of a small network of timm whose groups are of 8 channels."""


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnext29_g32_w4", num_classes=3).to(memory_format=torch.channels_last).train()


@fixture
def example() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_number_is_the_width_of_all_layers_that_it_divides(example: torch.Tensor) -> None:
    model = network()
    widths = {name: conv.in_channels // conv.groups for name, conv in grouped_convolutions(model).items()}
    factors = choose_factors(model, example, "16", "no")
    assert set(widths.values()) == {4, 8, 16}
    assert {name: factors.get(name, 1) * width for name, width in widths.items()} == dict.fromkeys(widths, 16)
    assert choose_factors(model, example, "off", "no") == {}


def test_a_step_in_the_form_has_the_gradients_and_statistics_of_the_network(example: torch.Tensor) -> None:
    found = []
    for merged in (False, True):
        model = network().double()
        trained = build_training_view(model, choose_factors(model, example.double(), "16", "no")) if merged else model
        torch.nn.functional.cross_entropy(trained(example.double()), torch.tensor([0, 1, 2, 0])).backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert isinstance(trained.get_submodule("layer1.0.conv2"), MergedConv2d)
    assert isinstance(trained.get_submodule("layer1.0.conv1"), PointwiseConv2d)
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)  # float64 sums in another order


def test_the_network_itself_stays_as_it_is_and_holds_what_the_form_learns(example: torch.Tensor) -> None:
    model = network()
    form = build_training_view(model, choose_factors(model, example, "16", "no"))
    assert not any(isinstance(module, (MergedConv2d, PointwiseConv2d)) for module in model.modules())
    own, shared = model.state_dict(keep_vars=True), form.state_dict(keep_vars=True)
    assert list(own) == list(shared)
    assert all(own[name] is tensor for name, tensor in shared.items())
    form(example)
    assert model.bn1.num_batches_tracked == 1


def remember(cache: Path, fastest: int) -> None:
    """Let a cache hold other times than were measured: one width is the fastest wherever it is possible."""
    (path,) = cache.glob("widths-*.json")
    kinds = json.loads(path.read_text())
    path.write_text(json.dumps({k: {w: 1.0 if w == str(fastest) else 9.0 for w in t} for k, t in kinds.items()}))


def test_a_run_keeps_the_widths_that_it_began_with_whatever_is_fastest_later(
    tmp_path: Path, monkeypatch: MonkeyPatch, command: Command
) -> None:
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    flags = ("train", *GROUPED, "--output-dir")
    assert command(*flags, tmp_path / "measured", "--max-steps", 1)[0] == 0
    remember(tmp_path / "cache", fastest=16)
    assert command(*flags, tmp_path / "run", "--max-steps", 2)[0] == 0
    first = RunRecord.load(tmp_path / "run" / "record.json").merged_groups
    assert set(first.values()) == {2}
    remember(tmp_path / "cache", fastest=32)
    assert command(*flags, tmp_path / "run", "--max-steps", 3)[0] == 0
    assert RunRecord.load(tmp_path / "run" / "record.json").merged_groups == first
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert command(*flags, tmp_path / "run", "--max-steps", 4)[0] == 0
    assert RunRecord.load(tmp_path / "run" / "record.json").merged_groups == first
    assert not list((tmp_path / "cache").iterdir())  # nothing was measured
    code, _, err = command(*flags, tmp_path / "run", "--max-steps", 5, "--merge-groups", "off")
    assert code == 0
    assert "merged groups differ from those before the resume; the weights can differ in their last bits" in err
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
network = build_model(plan.source, len(plan.splits.label_names), 0.0, 0.0)
state = TrainingState(plan, network, accelerator, peers)
found = {name: m.merge_factor for name, m in state.build_view().named_modules() if hasattr(m, "merge_factor")}
(folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
"""


def test_two_processes_take_the_widths_of_the_first_though_each_remembers_others(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    caches = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(caches[0]))
    torch.set_num_threads(1)
    model = timm.create_model("regnetx_002", num_classes=10).to(memory_format=torch.channels_last)
    example = torch.zeros(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    choose_factors(model, example, "auto", "no")
    shutil.copytree(*caches)
    remember(caches[0], fastest=16)
    remember(caches[1], fastest=24)
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


def test_a_killed_run_with_merged_groups_and_growing_images_goes_on_to_the_same_bits(
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
    # what was computed with wider groups is evaluated with the network's own
    assert set(RunRecord.load(whole / "record.json").merged_groups.values()) == {2, 3}
    assert command("evaluate", whole)[0] == 0


@mark.parametrize(
    ("flags", "said"),
    [
        (("--merge-groups", "wide"), "--merge-groups wide: expected auto, off or a width in channels from 1 to 65,536"),
        (("--merge-groups", "0"), "--merge-groups 0: expected auto, off or a width in channels from 1 to 65,536"),
        (("--progressive-size", "64"), "--progressive-size 64 is larger than --image-size 32"),
        (
            ("--model", "test_vit", "--image-size", "160", "--progressive-size", "128"),
            "--model test_vit does not accept 152 px, a size between --progressive-size 128 and",
        ),
        (("--progressive-size", "16"), "--progressive-size 16 is smaller than the stride of test_resnet (32)"),
    ],
)
def test_a_wrong_request_gets_one_line(flags: tuple[str, str], said: str, tmp_path: Path, command: Command) -> None:
    code, out, err = command("train", "--model", "test_resnet", *flags, "--output-dir", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_compiled_is_said_in_a_line(tmp_path: Path) -> None:
    empty = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_process(
        "scripts/train.py", *TINY, "--max-steps", 2, "--compile", "--output-dir", tmp_path / "run", **empty
    )
    assert done.returncode == 1
    assert "error: torch.compile failed" in done.stderr
    assert "without --compile the run goes on" in done.stderr
    assert "Traceback" not in done.stderr
