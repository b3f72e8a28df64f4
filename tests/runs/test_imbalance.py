"""Runs on a long tail: the same data for any number of processes, exact resume, and better recall of rare classes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pytest import TempPathFactory, approx, fixture, mark
from support.processes import TINY, run_interpreter, run_process
from support.runs import kill_at, lines, weights, without_clock

from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def tail(tmp_path_factory: TempPathFactory) -> Path:
    """Digits with 140 to 3 training images of a class, and a balanced evaluation split."""
    from resnext_hub.data.sources import load_digits_table

    table = load_digits_table()
    labels = np.array(table["label"])
    root = tmp_path_factory.mktemp("tail") / "digits-tail"
    root.mkdir()
    train, evaluation = [], []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        evaluation += members[140:].tolist()
        train += members[: round(140 * (3 / 140) ** (label / 9))].tolist()
    for split, rows in (("train", train), ("validation", evaluation)):
        table.select(rows).to_parquet(root / f"{split}.parquet")
    return root


FLAGS = (*TINY, "--image-size", 32, "--batch-size", 24, "--lr", 0.02, "--label-smoothing", 0)


def torchrun(processes: int, *flags: object) -> None:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", 0, "--rdzv_backend", "c10d"]
    start = run_process if processes < 3 else run_interpreter
    done = start(*words, "--rdzv_endpoint", "localhost:0", "scripts/train.py", *flags)
    assert done.returncode == 0, done.stderr


@mark.slow
def test_balanced_batches_have_the_same_pixels_for_any_number_of_processes(tail: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--dataset", tail, "--max-steps", 30, "--sampling", "balanced", "--log-samples")
    pixels = []
    for processes in (1, 2, 3):
        folder = tmp_path / f"{processes}"
        if processes == 1:
            assert run_process("scripts/train.py", *flags, "--output-dir", folder).returncode == 0
        else:
            torchrun(processes, *flags, "--output-dir", folder)
        parts = [lines(folder / f"samples-{process}.jsonl") for process in range(processes)]
        pixels.append([[pixel for line in step for pixel in line["pixels"]] for step in zip(*parts, strict=True)])
    assert pixels[0] == pixels[1] == pixels[2]
    assert len({pixel for step in pixels[0] for pixel in step}) > 500  # repeated images are augmented differently


@mark.slow
def test_the_weighted_loss_is_the_same_for_any_number_of_processes_and_micro_batches(
    tail: Path, tmp_path: Path
) -> None:
    """With layer norm, as batch norm sees only the part of a batch that a process has."""
    flags = (
        *FLAGS, "--model", "test_convnext", "--dataset", tail, "--max-steps", 3, "--class-weights", "auto",
        "--log-every", 1, "--eval-every", 1000,
    )  # fmt: skip
    torchrun(2, *flags, "--output-dir", tmp_path / "two")
    for name, more in (("one", ()), ("micro", ("--micro-batch-size", 7))):
        done = run_process("scripts/train.py", *flags, *more, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    losses, tensors = {}, {}
    for name in ("one", "two", "micro"):
        losses[name] = [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
        tensors[name] = weights(tmp_path / name)
        assert losses[name] == approx(losses["one"], rel=1e-4), name
        for key, tensor in tensors[name].items():
            torch.testing.assert_close(tensor, tensors["one"][key], rtol=1e-3, atol=1e-5)


def test_a_balanced_run_that_is_killed_resumes_bit_for_bit(tail: Path, tmp_path: Path, command: Command) -> None:
    flags = (
        *FLAGS, "--dataset", tail, "--max-steps", 40, "--sampling", "balanced", "--best-by", "macro-recall",
        "--eval-every", 0.5, "--checkpoint-every", 7, "--log-samples",
    )  # fmt: skip
    assert command("train", *flags, "--output-dir", tmp_path / "whole")[0] == 0
    kill_at(17, tmp_path / "killed", *flags)
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    assert "resuming from step-000000" in err
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name
    for name in ("metrics.jsonl", "samples-0.jsonl"):
        assert without_clock(lines(tmp_path / "killed" / name)) == without_clock(lines(tmp_path / "whole" / name))


def test_the_best_weights_have_the_best_macro_recall(tail: Path, tmp_path: Path, command: Command) -> None:
    flags = (*FLAGS, "--dataset", tail, "--max-steps", 40, "--best-by", "macro-recall", "--eval-every", 0.25)
    code, _, err = command("train", *flags, "--output-dir", tmp_path / "run")
    assert code == 0, err
    assert "macro recall" in err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    evaluations = [line for line in record.history if "eval_loss" in line]
    assert len(evaluations) > 3
    assert record.evaluation.macro_recall == max(line["eval_macro_recall"] for line in evaluations)
    assert all(len(line["eval_recall"]) == 10 for line in evaluations)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "chosen as the best of the run by macro recall on this split" in card


@mark.parametrize(
    ("correction", "flag"),
    [(("--sampling", "balanced"), "sampling"), (("--logit-adjustment", 1), "logit_adjustment")],
    ids=["sampling", "logit adjustment"],
)
def test_a_correction_lifts_the_recall_of_rare_classes(
    tail: Path, tmp_path: Path, command: Command, correction: tuple[object, ...], flag: str
) -> None:
    flags = (*FLAGS, "--dataset", tail, "--epochs", 6, "--best-by", "loss")
    recalls = {}
    for name, more in (("plain", ()), ("corrected", correction)):
        code, _, err = command("train", *flags, *more, "--output-dir", tmp_path / name)
        assert code == 0, err
        record = RunRecord.load(tmp_path / name / "record.json")
        recalls[name] = record.evaluation.macro_recall
    assert recalls["corrected"] > recalls["plain"] + 0.05, recalls
    assert f"| {flag} |" in (tmp_path / "corrected" / "model" / "README.md").read_text().replace("\\_", "_")


def test_class_weights_of_a_file_are_recorded_by_class_and_cannot_change(
    tail: Path, tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "secret-folder" / "weights.yaml"
    file.parent.mkdir()
    file.write_text("".join(f'"{label}": {1 + label}\n' for label in range(10)))
    flags = ("train", *FLAGS, "--dataset", tail, "--max-steps", 4, "--class-weights", file)
    code, _, err = command(*flags, "--output-dir", tmp_path / "run")
    assert code == 0, err
    content = json.loads((tmp_path / "run" / "record.json").read_text())
    assert content["class_weights"] == [float(label + 1) for label in range(10)]
    assert content["config"]["class_weights"] == "weights.yaml"
    assert "secret-folder" not in (tmp_path / "run" / "model" / "README.md").read_text()
    file.write_text("".join(f'"{label}": {2 + label}\n' for label in range(10)))
    code, _, err = command(*flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert "contains a different run: its class weights have changed" in err
    (tmp_path / "run" / "record.json").unlink()
    code, _, err = command(*flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert "--class-weights was" in err
