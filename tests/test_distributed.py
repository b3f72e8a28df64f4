"""Two processes are one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, TINY, run_process
from pytest import fixture

from resnext_hub.record import RunRecord

FLAGS = (*TINY, "--batch-size", "32", "--max-steps", "50", "--lr", "0.01", "--log-samples")


def torchrun(processes: int, *flags: object) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", 0, "--rdzv_backend", "c10d"]
    return run_process(*words, "--rdzv_endpoint", "localhost:0", "scripts/train.py", *flags)


@fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pair"
    done = torchrun(2, *FLAGS, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model folder:") == 1
    return folder


def samples(folder: Path, process: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"samples-{process}.jsonl").read_text().splitlines()]


def test_the_record_says_two_processes(pair: Path) -> None:
    assert RunRecord.load(pair / "record.json").processes == 2


def test_the_indices_of_two_processes_are_disjoint_and_make_up_the_global_batch(pair: Path, tmp_path: Path) -> None:
    assert run_process("scripts/train.py", *FLAGS, "--output-dir", tmp_path / "one").returncode == 0
    first, second, alone = samples(pair, 0), samples(pair, 1), samples(tmp_path / "one", 0)
    assert len(first) == len(second) == len(alone) == 50
    seen: list[int] = []
    for a, b, whole in zip(first, second, alone, strict=True):
        assert len(a["indices"]) == len(b["indices"]) == 16
        assert a["indices"] + b["indices"] == whole["indices"]
        seen += whole["indices"]
    assert sorted(seen[:1437]) == list(range(1437))  # every sample once, whatever the number of processes


def test_each_file_is_written_once(pair: Path) -> None:
    metrics = [json.loads(line) for line in (pair / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in metrics if "loss" in line]
    assert steps == [10, 20, 30, 40, 50]
    assert sorted(p.name for p in (pair / "checkpoints").iterdir()) == ["step-00000050"]
    assert not list(pair.rglob(".partial-*"))


def test_two_processes_count_every_evaluation_sample_once(pair: Path) -> None:
    evaluation = RunRecord.load(pair / "record.json").evaluation
    assert evaluation.count == 360
    assert sum(map(sum, evaluation.confusion)) == 360
    done = run_process("scripts/evaluate.py", pair)  # one process, the same counts
    assert done.returncode == 0, done.stderr
    assert "the same counts in every class" in done.stdout


def test_a_wrong_request_is_said_once_and_no_process_hangs(tmp_path: Path) -> None:
    done = torchrun(2, *TINY, "--batch-size", 33, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("--batch-size 33 is the global batch, and 2 processes do not divide it") == 1
    assert "nearest: 32 or 34" in done.stderr


def test_accelerate_launch_trains_with_one_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "accelerate.commands.launch", "-m", "resnext_hub", "train", *TINY]
    words += ["--max-steps", "2", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.processes == 1
    assert record.hardware["threads"] == len(os.sched_getaffinity(0))  # the launcher sets one
