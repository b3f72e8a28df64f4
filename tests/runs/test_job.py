"""A command leaves a complete run folder, does nothing if repeated, and resumes bit for bit if killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from pytest import MonkeyPatch, fixture, mark
from safetensors.torch import load_file
from support import warm_start
from support.processes import ROOT, TINY, run_process
from support.runs import kill_at, lines, weights, without_clock

from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of 60 steps on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run_process("scripts/train.py", *TINY, "--max-steps", 60, "--lr", 0.01, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_all_documented_files(finished: Path) -> None:
    names = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()} - {".lock"}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "predictions.parquet",
        "confusion.parquet",
        "record.json",
        "plots/curves.png",
        "plots/confusion_matrix.png",
        "plots/reliability.png",
        "plots/samples.png",
        "model/README.md",
        "model/config.json",
        "model/model.safetensors",
        "model/ood.safetensors",
        "model/plots/curves.png",
        "model/plots/confusion_matrix.png",
        "model/plots/reliability.png",
        *(f"checkpoints/step-000000{n}/{f}" for n in (50, 60) for f in ("model.safetensors", "optimizer.safetensors")),
        *(f"checkpoints/step-000000{n}/state.json" for n in (50, 60)),
    } | {n for n in names if n.endswith("/best.safetensors")}


def test_metrics_have_the_documented_fields_and_follow_the_schedule(finished: Path) -> None:
    found = lines(finished / "metrics.jsonl")
    logs = [line for line in found if "loss" in line]
    evaluations = [line for line in found if "eval_loss" in line]
    assert [line["step"] for line in logs] == [10, 20, 30, 40, 50, 60]
    assert set(logs[0]) == {"step", "epoch", "lr", "loss", "top1", "images_per_second", "data_wait"}
    # 1437 samples in batches of 64, evaluated every second epoch: the step that completes epoch 2 is 45
    assert [line["step"] for line in evaluations] == [45, 60]
    assert set(evaluations[0]) == {
        *("step", "epoch", "eval_loss", "eval_top1", "eval_correct", "eval_count"),
        *("eval_macro_recall", "eval_macro_f1", "eval_recall"),
    }
    assert evaluations[-1]["eval_count"] == 360
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_the_record_agrees_with_predictions_metrics_and_weights(finished: Path) -> None:
    record = RunRecord.load(finished / "record.json")
    table = parquet.read_table(finished / "predictions.parquet").to_pydict()
    correct = sum(a == b for a, b in zip(table["label"], table["prediction"], strict=True))
    assert (record.evaluation.correct, record.evaluation.count) == (correct, 360)
    assert record.evaluation.correct > 100  # chance level is 36
    assert np.trace(record.evaluation.matrix) == correct
    evaluations = [line for line in record.history if "eval_loss" in line]
    best = max(evaluations, key=lambda line: (line["eval_correct"], -line["eval_loss"]))
    assert (best["step"], best["eval_correct"]) == (record.evaluation.step, record.evaluation.correct)
    assert record.evaluation.loss < best["eval_loss"]  # because the published weights are calibrated
    assert record.model.parameters == sum(
        p.numel() for p in timm.create_model("test_resnet", num_classes=10).parameters()
    )
    assert (record.processes, record.resumes, record.steps) == (1, 0, 60)
    assert record.dataset.train_counts == np.bincount(load_labels("train")).tolist()


def load_labels(part: str) -> np.ndarray:
    from resnext_hub.data.config import DataConfig
    from resnext_hub.data.splits import load_splits

    return getattr(load_splits(DataConfig()), part).labels


def test_published_files_hold_no_path_user_or_host_name(finished: Path) -> None:
    import getpass
    import socket

    for path in (*(finished / "model").rglob("*"), finished / "record.json"):
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            for word in (str(finished.parent), str(ROOT), socket.gethostname()):
                assert word not in text, (path.name, word)
            if len(getpass.getuser()) > 4:  # shorter names, such as root, are ordinary words
                assert getpass.getuser() not in text


def test_repeating_a_finished_run_computes_nothing(finished: Path, command: Command) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    code, out, _ = command("train", *TINY, "--max-steps", 60, "--lr", 0.01, "--output-dir", finished)
    assert code == 0
    assert "already finished" in out
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_the_printed_lines_load_the_model(finished: Path, command: Command) -> None:
    _, out, _ = command("train", *TINY, "--max-steps", 60, "--lr", 0.01, "--output-dir", finished)
    assert f"model folder: {finished / 'model'}" in out
    code = "\n".join(line.strip() for line in out.splitlines() if line.startswith("    "))
    assert code.count("\n") == 2
    scope: dict[str, object] = {}
    exec(code, scope)
    for name, tensor in scope["model"].state_dict().items():
        assert torch.equal(tensor, weights(finished)[name]), name


def test_other_settings_in_a_used_folder_are_refused_with_the_difference(finished: Path, command: Command) -> None:
    code, _, err = command("train", *TINY, "--max-steps", 60, "--lr", 0.02, "--seed", 4, "--output-dir", finished)
    assert code == 2
    assert "--lr was 0.01 and is now 0.02" in err
    assert "--seed was 0 and is now 4" in err
    code, _, err = command("train", *TINY, "--max-steps", 30, "--lr", 0.01, "--output-dir", finished)
    assert code == 2
    assert "it has 60 steps, but this command asks for 30 (--epochs and --max-steps may only be increased)" in err
    code, _, err = command("train", *TINY, "--max-steps", 60, "--lr", 0.01, "--no-resume", "--output-dir", finished)
    assert code == 2
    assert "already contains a run" in err


def test_evaluate_repeats_the_recorded_counts(finished: Path, command: Command) -> None:
    code, out, _ = command("evaluate", finished)
    assert code == 0
    record = RunRecord.load(finished / "record.json").evaluation
    assert f"({record.correct}/360)" in out
    assert "the counts of every class match" in out


def test_evaluate_detects_changed_weights(finished: Path, tmp_path: Path, command: Command) -> None:
    import shutil

    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(finished, other)
    tensors = load_file(other / "model" / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].flip(0)
    save_file(tensors, other / "model" / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("evaluate", other)
    assert code == 1
    assert "the counts differ from the record" in err


def test_the_configuration_of_a_run_reproduces_it_bit_for_bit(finished: Path, tmp_path: Path, command: Command) -> None:
    code, _, err = command("train", "--config", finished / "config.yaml", "--output-dir", tmp_path / "again")
    assert code == 0, err
    assert "output_dir" not in yaml.safe_load((finished / "config.yaml").read_text())
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name]), name


def test_epochs_may_grow(tmp_path: Path, command: Command) -> None:
    flags = ("train", *TINY, "--output-dir", tmp_path / "run", "--batch-size", 256)
    assert command(*flags, "--epochs", 1)[0] == 0
    code, _, err = command(*flags, "--epochs", 2)
    assert code == 0, err
    assert "resuming from step-00000006" in err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert (record.steps, record.resumes) == (12, 1)
    assert [line["step"] for line in record.history if "eval_loss" in line] == [6, 12]


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, command: Command) -> None:
    flags = (
        *TINY, "--max-steps", 40, "--batch-size", 16, "--lr", 0.01, "--checkpoint-every", 7, "--log-samples",
        "--drop-rate", 0.2, "--drop-path", 0.1, "--micro-batch-size", 6,
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command("train", *flags, "--output-dir", whole)[0] == 0
    kill_at(16, killed, *flags)
    kill_at(30, killed, *flags)
    code, _, err = command("train", *flags, "--output-dir", killed)
    assert code == 0, err
    assert "resuming from step-000000" in err
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(killed / name)) == without_clock(lines(whole / name)), name
    assert RunRecord.load(killed / "record.json").resumes == 2


def test_a_folder_in_use_by_a_run_is_refused_with_its_pid(tmp_path: Path, command: Command) -> None:
    flags = (*TINY, "--max-steps", 4000, "--log-samples", "--output-dir", tmp_path / "run")
    words = [sys.executable, "scripts/train.py", *map(str, flags)]
    with warm_start.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (tmp_path / "run" / "samples-0.jsonl").is_file():
            assert run.poll() is None
            time.sleep(0.05)
        code, _, err = command("train", *flags)
        run.kill()
    assert code == 2
    assert f"in use by a running process, pid {run.pid}" in err


def test_a_run_on_folders_uses_their_names_as_classes(
    folder_of_classes: Path, tmp_path: Path, command: Command
) -> None:
    code, out, err = command(
        "train", *TINY, "--dataset", folder_of_classes, "--image-size", 32, "--batch-size", 8, "--epochs", 1,
        "--workers", 2, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["label_names"] == ["bus", "car", "train"]
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.dataset.id == "vehicles"
    assert record.config["dataset"] == "vehicles"
    assert record.command.endswith("--workers 2")
    assert command("evaluate", tmp_path / "run")[0] == 0, out


def corrupt_images(folder: Path) -> dict[str, str]:
    """Make four images unreadable in different ways; return their names and reasons."""
    (folder / "bus" / "000.png").write_bytes(b"")
    (folder / "bus" / "001.png").write_bytes(b"no image at all")
    (folder / "car" / "002.png").write_bytes((folder / "car" / "002.png").read_bytes()[:900])
    Image.new("L", (14000, 14000)).save(folder / "train" / "003.png")  # more pixels than the limit
    return {
        "bus/000.png": "zero bytes",
        "bus/001.png": "not an image",
        "car/002.png": "image file is truncated",
        "train/003.png": "more than 100000000 pixels (limit: max_image_pixels)",
    }


@mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_listed_and_do_not_stop_a_run(
    folder_of_classes: Path, tmp_path: Path, command: Command, workers: int
) -> None:
    expected = corrupt_images(folder_of_classes)
    flags = ("train", *TINY, "--dataset", folder_of_classes, "--image-size", 32, "--batch-size", 8, "--epochs", 2)
    flags += ("--workers", workers, "--output-dir", tmp_path / "run")
    code, _, err = command(*flags)
    assert code == 1
    assert "are unreadable, more than --max-bad-fraction 0.01 allows" in err
    code, _, err = command(*flags, "--max-bad-fraction", 0.5)
    assert code == 0, err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    listed = {entry.image: entry.reason for entry in record.unreadable_images}
    assert set(listed) == set(expected)
    for image, reason in expected.items():
        assert reason in listed[image]
    excluded = [entry for entry in record.unreadable_images if entry.split == "evaluation"]
    assert record.evaluation.count == record.dataset.eval_count - len(excluded)
    assert "4 unreadable images were replaced in training" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert command("evaluate", tmp_path / "run")[0] == 0


def test_a_single_unreadable_image_never_stops_a_run(folder_of_classes: Path, tmp_path: Path, command: Command) -> None:
    (folder_of_classes / "bus" / "000.png").write_bytes(b"")
    flags = ("--dataset", folder_of_classes, "--image-size", 32, "--batch-size", 8, "--epochs", 2)
    code, _, err = command("train", *TINY, *flags, "--output-dir", tmp_path / "run")
    assert code == 0, err
    assert len(re.findall(r"bus/000.png of the \w+ split is unreadable \(zero bytes\)", err)) == 1


def test_fine_tuning_starts_from_a_local_model_and_records_it(
    finished: Path, folder_of_classes: Path, tmp_path: Path, command: Command
) -> None:
    code, _, err = command(
        "train", "--model", f"local-dir:{finished / 'model'}", "--dataset", folder_of_classes, "--batch-size", 8,
        "--max-steps", 1, "--lr", 1e-9, "--mixed-precision", "no", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.base_model is not None
    assert (record.base_model.id, record.base_model.hub_id) == ("whole/model", None)
    assert record.model.requested == "local-dir:whole/model"
    base, tuned = weights(finished), weights(tmp_path / "run")
    assert torch.allclose(base["layer1.0.conv1.weight"], tuned["layer1.0.conv1.weight"], atol=1e-6)
    assert tuned["fc.weight"].shape[0] == 3
    assert record.model.input["input_size"] == [3, 32, 32]  # inherited from the base model


def test_the_card_of_a_cifar_model_states_that_it_needs_the_plugin(tmp_path: Path, command: Command) -> None:
    code, out, err = command(
        "train", "--model", "resnext29_g32_w4", "--batch-size", 8, "--max-steps", 1, "--eval-fraction", 0.02,
        "--merge-groups", "off", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["architecture"] == "resnext29_g32_w4"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "**Loading this model needs `pip install resnext-hub` and `import resnext_hub`.**" in card
    code = "\n".join(line.strip() for line in out.splitlines() if line.startswith("    "))
    assert "import resnext_hub" in code
    done = run_process("-c", code)
    assert done.returncode == 0, done.stderr
    plain = run_process("-c", code.replace("import resnext_hub", ""))
    assert "Unknown model" in plain.stderr


DIVERGING = ("--optimizer", "sgd", "--lr", 1000, "--weight-decay", 1000)
"""Flags with which each step multiplies the weights by a million."""


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path, command: Command) -> None:
    code, _, err = command("train", *TINY, *DIVERGING, "--max-steps", 20, "--output-dir", tmp_path / "run")
    assert code == 1
    # the exact step is named, although the loss is read only every ten steps
    found = re.search(
        r"the loss is (?:nan|inf) at step (\d+); there is no checkpoint yet; try a lower --lr, or --clip-grad 1", err
    )
    assert found
    assert 1 < int(found.group(1)) < 10
    assert err.count("error:") == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, command: Command) -> None:
    flags = ("train", *TINY, *DIVERGING, "--max-steps", 20, "--output-dir", tmp_path / "run")
    code, _, err = command(*flags, "--checkpoint-every", 1)
    assert code == 1
    assert re.search(r"the (weights are not finite|loss is (nan|inf)) at step \d; ", err)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*")) if "last good" in err else []
    for path in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint_named_and_it_resumes_later(
    tmp_path: Path, command: Command
) -> None:
    """A limit on file sizes below that of a checkpoint stands in for a full disk."""
    flags = [*TINY, "--max-steps", 30, "--lr", 0.01, "--checkpoint-every", 10, "--output-dir", tmp_path / "run"]
    assert command("train", *flags)[0] == 0
    small = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    small += "from resnext_hub.cli.main import main; sys.exit(main(sys.argv[1:]))"
    flags[flags.index(30)] = 50
    done = run_process("-c", small, "train", *flags)
    assert done.returncode == 1
    assert "the checkpoint of step 40 could not be written" in done.stderr
    assert "the last good checkpoint is step-00000030" in done.stderr
    assert len(re.findall(r"^error: ", done.stderr, re.MULTILINE)) == 1
    code, _, err = command("train", *flags)
    assert code == 0
    assert "resuming from step-00000030" in err


def start(folder: Path, *flags: object) -> "subprocess.Popen[str]":
    words = [sys.executable, "scripts/train.py", *map(str, flags), "--output-dir", str(folder)]
    return warm_start.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_sigterm_and_ctrl_c_save_and_the_run_resumes_bit_for_bit(
    tmp_path: Path, command: Command, number: signal.Signals, workers: int
) -> None:
    flags = (
        *TINY, "--max-steps", 60, "--batch-size", 16, "--lr", 0.01, "--log-samples", "--ema", 0.9, "--workers", workers,
    )  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command("train", *flags, "--output-dir", whole)[0] == 0
    for step in (5, 30):
        with start(stopped, *flags) as run:
            while count_lines(stopped / "samples-0.jsonl") < step and run.poll() is None:
                time.sleep(0.002)
            for child in children(
                run.pid
            ):  # like a terminal or scheduler, which signals the whole process group; workers first
                os.kill(child, number)
            run.send_signal(number)
            _, err = run.communicate(timeout=30)
        assert run.returncode == 128 + number, err
        found = re.search(rf"stopped by {number.name}; step (\d+) of 60 is saved: rerun the same command", err)
        assert found
        assert (stopped / "checkpoints" / f"step-{int(found.group(1)):08d}").is_dir()
        assert "Traceback" not in err
    assert command("train", *flags, "--output-dir", stopped)[0] == 0
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(stopped / name)) == without_clock(lines(whole / name)), name


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_an_evaluation_interrupted_by_sigterm_is_repeated_on_resume(
    tmp_path: Path, folder_of_classes: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    """This process receives the signal in the second batch of the evaluation after step 2."""
    from resnext_hub.data import loaders

    flags = (
        "train", *TINY, "--dataset", folder_of_classes, "--image-size", 32, "--batch-size", 12, "--epochs", 2,
        "--lr", 0.01, "--eval-fraction", 0.5, "--eval-batch-size", 4, "--deterministic",
    )  # fmt: skip
    assert command(*flags, "--output-dir", tmp_path / "whole")[0] == 0
    read, seen = loaders.EvaluationSamples.__getitem__, []

    def read_with_signal(samples: loaders.EvaluationSamples, index: int) -> loaders.Sample:
        seen.append(index)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(samples, index)

    monkeypatch.setattr(loaders.EvaluationSamples, "__getitem__", read_with_signal)
    code, _, err = command(*flags, "--output-dir", tmp_path / "stopped")
    assert code == 143
    assert "stopped by SIGTERM; step 2 of 3 is saved" in err
    assert len(seen) < 15
    code, _, err = command(*flags, "--output-dir", tmp_path / "stopped")
    assert code == 0, err
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "stopped")[name]), name
    logs = [without_clock(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_the_moving_average_is_evaluated_kept_and_published(tmp_path: Path, command: Command) -> None:
    flags = ("train", *TINY, "--max-steps", 40, "--lr", 0.01, "--ema", 0.95, "--no-calibrate", "--output-dir")
    flags = (*flags, tmp_path / "run")
    assert command(*flags)[0] == 0
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.evaluation.step == 40
    folder = tmp_path / "run" / "checkpoints" / "step-00000040"
    average, raw, published = (
        load_file(folder / "ema.safetensors"),
        load_file(folder / "model.safetensors"),
        weights(tmp_path / "run"),
    )
    for name, tensor in published.items():
        assert torch.equal(tensor, average[name]), name
    assert not torch.equal(published["fc.weight"], raw["fc.weight"])
    assert command("evaluate", tmp_path / "run")[0] == 0
    assert "the moving average at step 40" in (tmp_path / "run" / "model" / "README.md").read_text()
