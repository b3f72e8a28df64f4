"""Wrong requests end early, in one or two lines that say what would work."""

import contextlib
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm.optim  # noqa: F401 - which the user without rights may not be able to
from pytest import CaptureFixture, MonkeyPatch, mark, raises
from support.processes import TINY, write_images

from resnext_hub import machine
from resnext_hub.cli.main import build_parser, main
from resnext_hub.errors import RequestError
from resnext_hub.runs.recipes import RECIPES
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.settings import flag_of
from resnext_hub.training.config import TrainConfig, flat_fields

Command = Callable[..., tuple[int, str, str]]


@mark.parametrize(
    ("flags", "parts"),
    [
        (["--model", "resnext_g23"], ["--model resnext_g23: no such model; closest matches:", "resnext_g2"]),
        (
            ["--model", "resnext_g32.a9_in1k"],
            ["resnext_g32 has no weights tagged a9_in1k; available tags: ", "a1h_in1k"],
        ),
        (["--model", "me/repo"], ["hf-hub:me/repo", "local-dir:me/repo"]),
        (["--model", "resnext_g8", "--pretrained"], ["resnext_g8 has no released weights", "resnext_g32"]),
        (["--dataset", "./nowhere"], ["--dataset ./nowhere does not exist and is not a valid dataset ID on the Hub"]),
        (["--recipe", "slow"], ["--recipe slow does not exist; available: quickstart"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml cannot be read"]),
        (["--batch-size", "0"], ["--batch-size 0: expected a whole number from 1 to 1,048,576"]),
        (["--batch-size", "many"], ["--batch-size many: expected a whole number from 1"]),
        (["--lr", "-1"], ["--lr -1.0: expected a number above 0"]),
        (
            ["--image-size", "16"],
            ["16 is smaller than the stride of test_resnet (32); use --image-size 32 or larger"],
        ),
        (["--batch-size", "1"], ["and its last feature map is 1 x 1, which is too small for batch norm"]),
        (["--batch-size", "5", "--micro-batch-size", "2"], ["a single image of 32 px"]),
        (["--mixed-precision", "fp16"], ["fp16 needs a CUDA GPU, but the device is cpu"]),
        (["--auto-augment", "sparkle"], ["--auto-augment sparkle"]),
        (["--interpolation", "sparkle"], ["--interpolation sparkle"]),
        (["--threads", "none"], ["--threads none: expected auto or a number of threads from 1 to 1,024"]),
        (["--scale", "0.9", "0.1"], ["--scale 0.9 0.1: expected the smaller number first"]),
        (["--std", "0", "0.2", "0.2"], ["--std 0.0: expected a number from 0.0001 to 1"]),
        (["--std", "58.4", "57.1", "57.4"], ["--std 58.4: expected a number from 0.0001 to 1"]),
        (["--mean", "123.7", "116.3", "103.5"], ["--mean 123.7: expected a number from -1 to 1"]),
        (["--crop-pct", "0.01"], ["--crop-pct 0.01: expected a number from 0.05 to 1.25"]),
        (["--image-size", "5000"], ["--image-size 5000: expected a whole number from 1 to 4,096"]),
        (["--image-size", "512", "--crop-pct", "0.06"], ["--image-size 512 with --crop-pct 0.06", "8,533 px", "8,192"]),
        (["--image-size", "4096", "--crop-pct", "0.4"], ["--image-size 4096 with --crop-pct 0.4", "10,240 px"]),
        (["--sparkle"], ["unrecognized arguments: --sparkle (see resnext-hub train --help)"]),
        (["--datset", "digits"], ["unrecognized arguments: --datset digits; did you mean --dataset?"]),
        (["--learning-rate=1e-3"], ["--learning-rate=1e-3; did you mean --lr?"]),
        (["--imgsz", "64"], ["did you mean --image-size?"]),
        (["--seed", "1e20"], ["--seed 1e20: expected a whole number from 0 to 9,223,372,036,854,775,807"]),
        (["--split-seed", "5000000000"], ["--split-seed 5000000000: expected a whole number from 0 to 4,294,967,295"]),
        (["--eval-fraction", "nan"], ["--eval-fraction nan: expected a number above 0 and"]),
        (["--workers", "10000"], ["--workers 10000: expected a whole number from 0 to 256"]),
        (["--dataset", ""], ["--dataset is empty"]),
        (["--output-dir", ""], ["--output-dir: an empty string: expected a path"]),
        (["--output-dir", "x" * 300], ["File name too long"]),
        (["--eval-split", "test"], ["--eval-split test: no such split; choose one of train"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0].startswith("--") else "",
)
def test_a_wrong_request_exits_with_2_in_two_lines(
    flags: list[str], parts: list[str], command: Command, tmp_path: Path
) -> None:
    code, out, err = command("train", *TINY, *flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []
    for part in parts:
        assert part in err


def test_a_single_class_and_a_missing_image_column_exit_with_2(command: Command, tmp_path: Path) -> None:
    import datasets

    write_images(tmp_path / "pets" / "cat", 4, 100)
    code, _, err = command("train", *TINY, "--dataset", tmp_path / "pets", "--output-dir", tmp_path / "run")
    assert code == 2
    assert "has a single class, cat (" in err
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "table.parquet")
    code, _, err = command("train", *TINY, "--dataset", tmp_path / "table.parquet", "--output-dir", tmp_path / "run")
    assert code == 2
    assert "has no column of images, or of the names of images in" in err


def test_a_dataset_that_is_nowhere_exits_with_1_if_the_hub_cannot_be_asked(command: Command, tmp_path: Path) -> None:
    code, _, err = command("train", *TINY, "--dataset", "me/pets", "--output-dir", tmp_path / "run")
    assert code == 1
    assert "me/pets is not a local folder, and the Hub could not be reached" in err


def test_released_weights_without_the_hub_say_what_would_work(command: Command, tmp_path: Path) -> None:
    flags = ("--model", "resnext_g32", "--pretrained", "--output-dir", tmp_path / "run")
    code, _, err = command("train", *TINY, *flags)
    assert code == 1
    assert (
        "model.safetensors of timm/resnext50_32x4d.a1h_in1k is not in the cache, and the Hub could not be reached"
        in err
    )


def _train_without_rights(folder: Path, errors: Path) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(["train", *TINY, "--output-dir", str(folder)])
    errors.write_text(f"{code} {stderr.getvalue()}")


@mark.parametrize("name", ["run", ""], ids=["below", "itself"])
def test_an_unwritable_folder_exits_with_2(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        folder, errors = Path(scratch, "closed"), Path(scratch, "errors")
        folder.mkdir(mode=0o555)
        errors.touch(mode=0o666)
        errors.chmod(0o666)
        child = multiprocessing.get_context("fork").Process(target=_train_without_rights, args=(folder / name, errors))
        child.start()
        child.join()
        assert errors.read_text().startswith("2 error: ")
        assert "is not writable: permission denied; choose another --output-dir" in errors.read_text()


def test_a_finished_run_on_a_disk_that_is_read_only_is_found_finished(
    finished: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on such a disk, for root as well
    flags = ("train", *TINY, "--lr", 0.01, "--output-dir", finished, "--max-steps")
    code, out, _ = command(*flags, 30)
    assert code == 0
    assert "is already finished; nothing was computed" in out
    code, _, err = command(*flags, 31)
    assert code == 2
    assert "is not writable: permission denied" in err


def test_a_tilde_is_the_home_folder_where_a_shell_leaves_it(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_parser().parse_args(["train", "--output-dir=~/runs/a"]).output_dir == tmp_path / "runs" / "a"


def test_a_folder_that_cannot_be_made_exits_with_2(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = command("train", *TINY, "--output-dir", tmp_path / "file" / "run")
    assert code == 2
    assert f"cannot be created, because {tmp_path / 'file'} is a file; choose another --output-dir" in err


def test_a_folder_of_other_things_is_left_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    code, _, err = command("train", *TINY, "--output-dir", tmp_path)
    assert code == 2
    assert "contains other files (model) but no run" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@mark.parametrize(
    ("processes", "asked", "says"),
    [
        (3, {"batch_size": 64}, "cannot be divided evenly among 3 processes; use 63 or 66"),
        (
            2,
            {"batch_size": 66, "mixup": 0.2},
            "gives 33 images per process, but mixup and cutmix need pairs of images; use 64 or 68",
        ),
    ],
    ids=["not divided", "odd part"],
)
def test_a_batch_that_the_processes_cannot_share_is_refused(
    monkeypatch: MonkeyPatch, tmp_path: Path, processes: int, asked: dict[str, float], says: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    settings, _ = merge_settings({"model": "test_resnet", **asked})
    with raises(RequestError, match=says):
        prepare(settings, asked=asked, output_dir=tmp_path / "run")


def test_lanes_that_do_not_divide_the_batch_are_refused(command: Command, tmp_path: Path) -> None:
    from resnext_hub.data.sources import load_digits_table

    for split in ("train", "test"):
        load_digits_table().select(range(20)).to_parquet(tmp_path / "digits" / f"{split}-0.parquet")
    flags = (*TINY, "--image-size", 32, "--batch-size", 12, "--lanes", 5, "--output-dir", tmp_path / "run")
    code, _, err = command("train", *flags, "--dataset", tmp_path / "digits", "--streaming")
    assert code == 2
    assert "--lanes 5 does not divide --batch-size 12; use one of 1, 2, 3, 4, 6, 12" in err
    code, _, err = command("train", *flags)
    assert code == 2
    assert "--lanes 5 needs --streaming" in err


def test_a_stream_of_an_earlier_version_is_not_resumed_in_another_order(tmp_path: Path) -> None:
    from resnext_hub.data.sources import load_digits_table

    for split in ("train", "test"):
        load_digits_table().select(range(20)).to_parquet(tmp_path / "digits" / f"{split}-0.parquet")
    asked = {"model": "test_resnet", "dataset": str(tmp_path / "digits"), "streaming": True, "image_size": 32}
    settings = prepare(asked, asked=asked, output_dir=tmp_path / "run").config.to_flat()
    assert settings.pop("lanes") == 4
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))  # of a version without lanes
    with raises(
        RequestError, match="a run of an earlier version, which read its stream in a different order, so it can"
    ):
        prepare(asked, asked=asked, output_dir=tmp_path / "run")


@mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_training_is_refused_in_a_line(variable: str, command: Command, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    code, _, err = command("train", *TINY)
    assert code == 2
    assert "use plain data parallelism" in err


@mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--micro-batch-size"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "--micro-batch-size"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "abc\x1b[1m", r"abc\x1b[1m"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "--compile"),
        ("ACCELERATE_DYNAMO_BACKEND", "nonsense", "--compile"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "CUDA_VISIBLE_DEVICES"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "expected no, bf16 or fp16"),
    ],
)
def test_variables_by_which_accelerate_would_train_otherwise_are_refused(
    command: Command, monkeypatch: MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, _, err = command("train", *TINY)
    assert code == 2
    assert err.startswith(f"error: {variable} is ")
    assert says in err


def test_a_folder_that_is_no_run_is_refused(command: Command, tmp_path: Path) -> None:
    for words in (("evaluate", tmp_path), ("push", tmp_path, "--repo-id", "me/name")):
        code, _, err = command(*words)
        assert code == 2
        assert "has no record.json" in err


def test_precedence_is_recipe_file_flags_whatever_the_order(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nbatch_size: 16\n")
    settings, recipe = merge_settings({"lr": 0.25}, None, file)
    assert recipe == "quickstart"
    assert (settings["lr"], settings["batch_size"], settings["optimizer"]) == (0.25, 16, "adamw")
    assert merge_settings({"dataset": "pets"}, None, None) == ({"dataset": "pets"}, None)


def test_a_file_with_wrong_settings_is_refused(tmp_path: Path) -> None:
    with raises(RequestError, match=r"unknown setting learning_rate; did you mean lr\?"):
        TrainConfig.from_flat({"learning_rate": 1})
    with raises(RequestError, match=r"unknown setting epoch; did you mean epochs\?"):
        TrainConfig.from_flat({"epoch": 1})
    with raises(RequestError, match=r"epochs=nan: expected a number from 0"):
        TrainConfig.from_flat({"epochs": float("nan")})
    (tmp_path / "bytes.yaml").write_bytes(b"\x94\xff")
    with raises(RequestError, match=r"config .*bytes.yaml cannot be read"):
        merge_settings({}, None, tmp_path / "bytes.yaml")
    with raises(RequestError, match=r"epochs=ten: expected a number"):
        TrainConfig.from_flat({"epochs": "ten"})
    with raises(RequestError, match=r"mixed_precision=fp8: expected one of auto, no, bf16, fp16"):
        TrainConfig.from_flat({"mixed_precision": "fp8"})


@mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_right_configuration(name: str) -> None:
    config = TrainConfig.from_flat(RECIPES[name].settings)
    assert TrainConfig.from_flat(config.to_flat()) == config


def test_every_setting_has_a_flag_and_a_sentence(capsys: CaptureFixture[str]) -> None:
    with raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in flat_fields().values():
        assert flag_of(field.name) in text
        assert field.help.endswith("."), field.name


@mark.parametrize(
    ("asked", "launcher", "fast", "resolved"),
    [
        ("auto", "no", True, "bf16"),
        ("auto", "no", False, "no"),
        ("auto", "bf16", False, "bf16"),
        ("no", "bf16", True, "no"),
        ("bf16", "no", False, "bf16"),
    ],
)
def test_an_explicit_precision_wins_over_the_launchers_and_that_over_the_machines(
    asked: str, launcher: str, fast: bool, resolved: str, monkeypatch: MonkeyPatch
) -> None:

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(machine, "_cpu_computes_bf16", lambda: fast)
    assert machine.resolve_precision(asked, "cpu") == resolved


def test_recipes_are_listed_and_shown_with_settings_and_sources(command: Command) -> None:
    code, out, _ = command("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[: len(RECIPES)]] == list(RECIPES)
    for name, recipe in RECIPES.items():
        code, out, _ = command("recipes", name)
        assert code == 0
        assert f"source: {recipe.source}\nresult: {recipe.result}\n" in out
        flags = [flag_of(k).replace("--", "--no-", 1) if v is False else flag_of(k) for k, v in recipe.settings.items()]
        assert all(flag in out for flag in flags)
        code, out, _ = command("recipes", name, "--json")
        tiers = {"tiers": {tier.name: tier.settings for tier in recipe.tiers}} if recipe.tiers else {}
        assert json.loads(out) == recipe.settings | tiers
    code, _, err = command("recipes", "finetun")
    assert code == 2
    assert "did you mean finetune?" in err
    code, _, err = command("train", "--recipe", "imagenet")
    assert code == 2
    assert "--recipe imagenet does not exist" in err
    assert "imagenet is now called paper" in err
