"""Requests that would fail later are refused before the first step, in one line that states what works."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pytest import CaptureFixture, MonkeyPatch, mark, raises
from support.processes import TINY, run_process, save_with_timm

from resnext_hub.cli import main as cli
from resnext_hub.data.augment import Augmentation
from resnext_hub.data.transforms import TransformConfig
from resnext_hub.errors import RequestError
from resnext_hub.machine import is_out_of_memory
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.saved_config import CROP, MEAN, STD
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.checks import check_space
from resnext_hub.runs.request import prepare
from resnext_hub.runs.summary import _fitting_batch
from resnext_hub.training.optim import OptimConfig, check_optimizer

Command = Callable[..., tuple[int, str, str]]

INPUT = {"input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@mark.parametrize(
    "policy",
    [
        "rand",
        "rand-m9-n3-mstd0.5-inc1",
        "rand-m15-mmax20-p0.5",
        "rand-mstd1-tweights",
        "rand-t3aw",
        "augmix-m5-w4-d2-b1-a0.5",
        "3a",
        "v0",
        "v0r-mstd0.5",
        "original",
        "originalr",
    ],
)
def test_a_policy_in_timms_notation_is_accepted(policy: str) -> None:
    augmentation = Augmentation(TransformConfig(auto_augment=policy), InputConfig.resolve(INPUT))
    assert augmentation.colours is not None


@mark.parametrize(
    ("policy", "reason"),
    [
        ("rand-foo", "foo: expected mN, nN"),
        ("rand-m99", "m99: expected a whole number from 0 to 10"),
        ("rand-m21-mmax20", "m21: expected a whole number from 0 to 20"),
        ("rand-m1.5", "m1.5: expected a whole number"),
        ("rand-m9-m5", "m is given twice"),
        ("rand-tfoo", "tfoo: expected"),
        ("rand-m-1", "m: expected"),
        ("rand-p2", "p2: expected a number above 0 and at most 1"),
        ("rand-", "an empty part"),
        ("random", "random is not a policy; expected one of rand, augmix"),
        ("augmix-x", "x: expected mN, wN"),
        ("augmix-d0", "d0: expected a whole number from 1"),
        ("3a-m5", "m5: expected mstdN after 3a-"),
        ("", "an empty name is not a policy"),
        ("RAND-m9", "RAND is not a policy"),
    ],
)
def test_a_policy_that_timm_would_partly_ignore_is_refused(policy: str, reason: str) -> None:
    with raises(RequestError, match=f"auto_augment=.*{reason}.*rand-m7-mstd0.5, augmix-m3 (or|and) 3a"):
        TransformConfig(auto_augment=policy)


@mark.parametrize("name", ["sgd", "adamw", "lamb", "muon"])
def test_checking_an_optimizer_leaves_the_random_state_unchanged(name: str) -> None:
    before = torch.get_rng_state()
    check_optimizer(OptimConfig(optimizer=name), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@mark.parametrize("name", ["adahessian", "bnbadam", "fusedadam", "kron", "adafactorbv"])
def test_an_optimizer_that_does_not_work_here_is_refused(name: str) -> None:
    with raises(RequestError, match=r"choose another.*, such as sgd, adamw or lamb"):
        check_optimizer(OptimConfig(optimizer=name), "cpu")


@mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_package_is_reported_before_training(
    name: str, command: Command, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    code, _, err = command("train", *TINY, "--output-dir", tmp_path / "run")
    assert code == 2
    assert err == f'error: {name} is not installed; pip install "resnext-hub[train]"\n'
    assert not (tmp_path / "run").exists()


def base_model(folder: Path, **facts: object) -> str:
    """Write a model folder of test_resnet with changes to its pretrained_cfg; return its name for `model`."""
    save_with_timm(folder, "test_resnet", 32)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | facts}))
    return f"local-dir:{folder}"


@mark.parametrize("size", [(32, 64), (64, 32), (1, 32)])
def test_a_base_model_of_non_square_images_needs_an_image_size(
    size: tuple[int, int], tmp_path: Path, folder_of_classes: Path
) -> None:
    settings = {"model": base_model(tmp_path / "base", input_size=[3, *size]), "dataset": str(folder_of_classes)}
    with raises(
        RequestError, match=rf"base expects images of {size[0]} x {size[1]} pixels .*; add image_size={max(size)}"
    ):
        prepare(settings, asked=settings, output_dir=tmp_path / "run")
    plan = prepare(settings | {"image_size": 48}, asked=settings, output_dir=tmp_path / "run")
    assert plan.config.transform.image_size == 48
    assert plan.input.input_size == (3, 48, 48)


def test_extreme_input_settings_of_a_base_model_are_valid_settings_of_a_run(
    tmp_path: Path, folder_of_classes: Path
) -> None:
    for number, facts in enumerate(
        (
            {"crop_pct": CROP[1], "mean": [MEAN[0]] * 3, "std": [STD[0]] * 3},
            {"crop_pct": CROP[0], "mean": [MEAN[1]] * 3, "std": [STD[1]] * 3},
        )
    ):
        settings = {"model": base_model(tmp_path / f"base-{number}", **facts), "dataset": str(folder_of_classes)}
        plan = prepare(settings, asked=settings, output_dir=tmp_path / "run")
        assert {name: plan.config.to_flat()[name] for name in facts} == facts
        again = prepare(plan.config.to_flat(), asked={}, output_dir=tmp_path / "run")
        assert again.input == plan.input


def test_crop_pct_and_the_size_of_the_base_model_are_checked_together(tmp_path: Path, folder_of_classes: Path) -> None:
    settings = {"model": base_model(tmp_path / "base", input_size=[3, 1024, 1024]), "dataset": str(folder_of_classes)}
    with raises(RequestError, match=r"image_size=1024 with crop_pct=0.1 resizes images to 10,240 px .* 8,192"):
        prepare(settings | {"crop_pct": 0.1}, asked=settings, output_dir=tmp_path / "run")


def test_a_disk_without_space_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    check_space(RunFolder(tmp_path / "run"), 1000)
    with raises(
        RequestError, match=r"the disk that holds .*run has only \d+ MB free, but a checkpoint and the model folder"
    ):
        check_space(RunFolder(tmp_path / "run"), 10**18)


@mark.parametrize("folder", ["/proc/foo", "/dev/null/x", "/sys/x"])
def test_a_run_folder_that_cannot_be_created_is_refused(folder: str, command: Command) -> None:
    code, _, err = command("train", *TINY, "--output-dir", folder)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: the run folder {folder} cannot be")
    assert err.endswith("choose another --output-dir\n")


def test_the_suggested_batch_size_makes_enough_steps() -> None:
    for count, epochs in ((48, 30.0), (48, 1.0), (5, 3.0), (1_000, 1.0), (10**6, 0.001)):
        batch = _fitting_batch(count, epochs)
        assert batch == 2 or (count / batch >= 4 and count * epochs / batch >= 20)
    assert _fitting_batch(48, 30.0) == 8


def test_errors_of_failed_allocations_are_recognized() -> None:
    with raises(RuntimeError) as torch_error:
        torch.empty(2**60)
    with raises(MemoryError) as numpy_error:
        np.empty(2**59)
    for error in (torch_error.value, numpy_error.value, MemoryError(), OSError(12, "Cannot allocate memory")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("size mismatch"), OSError(28, "No space left on device"), ValueError("memory")):
        assert not is_out_of_memory(other)


def test_a_run_out_of_memory_suggests_a_smaller_micro_batch(tmp_path: Path) -> None:
    code = """
import resource, sys, psutil
from resnext_hub.cli.main import main
import accelerate, datasets, sklearn.datasets, matplotlib.pyplot, torch._dynamo
limit = psutil.Process().memory_info().vms + (700 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""
    flags = ("--image-size", 512, "--batch-size", 1024, "--max-steps", 2, "--output-dir", tmp_path / "run")
    done = run_process("-c", code, "train", *TINY, *flags)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory: 1024 images of 512 px per pass (global batch 1024, evaluation 64)")
    assert "--micro-batch-size 512" in last
    assert "Traceback" not in done.stderr


def test_a_batch_larger_than_the_training_split_causes_a_warning(
    folder_of_classes: Path, tmp_path: Path, command: Command
) -> None:
    flags = ("--image-size", 32, "--max-steps", 1, "--batch-size", 32, "--output-dir", tmp_path / "run")
    code, _, err = command("train", *TINY, "--dataset", folder_of_classes, *flags)
    assert code == 0, err
    assert "--batch-size 32 is larger than the training split (24 images), so steps repeat images; " in err
    assert "--batch-size 4 gives 6 steps per epoch" in err


@mark.parametrize(
    ("words", "hint"),
    [
        (["trainn"], "did you mean train?"),
        (["eval", "x"], "did you mean evaluate?"),
        (["benchmark", "inferense"], "did you mean inference?"),
        (["train", "--recipe", "finetuen"], "did you mean finetune?"),
        (["predict", "x", "y", "--batchsize", "3"], "did you mean --batch-size?"),
        (["nonsense"], "is not one of train, check, evaluate"),
        ([], "required"),
        (["benchmark"], "required"),
        (["info", "--like"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_word_is_reported_in_one_line(words: list[str], hint: str, command: Command) -> None:
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert hint in err


@mark.parametrize(
    ("variables", "reports"),
    [
        ({"RANK": ""}, True),
        ({"RANK": "x", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "00", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False),
    ],
)
def test_only_the_first_process_of_a_run_reports(
    variables: dict[str, str], reports: bool, command: Command, monkeypatch: MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, _ = command("info", "resnext_g32")
    assert (code, "resnext_g32" in out) == (0, reports)
    code, _, err = command("info", "nonsense")
    assert (code, "is not a variant" in err) == (2, reports)


def test_paths_that_cannot_be_written_are_refused_by_name(command: Command) -> None:
    code, _, err = command("info", "--write-cards", "/dev/full")
    assert (code, err) == (
        2, "error: --write-cards /dev/full cannot be written to: File exists; choose another folder\n"
    )  # fmt: skip
    code, _, err = command("train", "--output-dir", "caf\udce9")
    assert code == 2
    assert "caf\\xe9: not valid UTF-8; expected a path in UTF-8" in err


def test_output_that_cannot_be_written_is_reported_in_one_line(
    capsys: CaptureFixture[str], monkeypatch: MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["info", "resnext_g32"]) == 1
    assert capsys.readouterr().err == "error: cannot write to standard output: No space left on device\n"


def test_standard_output_may_be_closed(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info", "resnext_g32"]) == 0
    sys.stdout.close()
