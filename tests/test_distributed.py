"""Two processes are one run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, TINY, run_process
from pytest import fixture

from resnext_hub.record import RunRecord

PNG = {"bytes": (ROOT / "docs" / "quickstart.png").read_bytes(), "path": None}
"""A picture of its own kind, but a picture."""

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


def test_a_run_of_two_processes_killed_in_the_second_epoch_goes_on_with_one(tmp_path: Path) -> None:
    """In the steps that count, those before the checkpoint and those after it, each sample of an epoch comes once."""
    folder = tmp_path / "run"
    flags = (*FLAGS, "--checkpoint-every", "20", "--epochs", "2", "--output-dir", folder)  # 45 steps make an epoch
    flags = tuple("90" if flag == "50" else flag for flag in flags)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    words = [sys.executable, *words, "--rdzv_endpoint", "localhost:0", "scripts/train.py", *map(str, flags)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (folder / "samples-0.jsonl").is_file() or len(samples(folder, 0)) < 66:
            assert run.poll() is None
            time.sleep(0.01)
        run.terminate()
    before = samples(folder, 0), samples(folder, 1)
    stopped = len(before[0])
    assert 66 <= stopped < 90
    done = run_process("scripts/train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f"going on from step-{stopped:08d}" in done.stderr
    assert "processes: 2 before, 1 now; data and schedule stay the same, the weights can differ" in done.stderr
    after = samples(folder, 0)
    seen: list[int] = []
    for step in range(90):
        alone = after[step]["indices"]
        seen += alone if step >= stopped else before[0][step]["indices"] + before[1][step]["indices"]
    assert sorted(seen[:1437]) == sorted(seen[1437:2874]) == list(range(1437))
    record = RunRecord.load(folder / "record.json")
    assert (record.processes, record.resumes) == (1, 1)


def test_two_processes_prepare_a_dataset_once(tmp_path: Path) -> None:
    """Both ask for the same parquet file at the same moment; the library's lock makes one of them wait."""
    import datasets

    rows = {"image": [PNG] * 40, "label": ["a", "b"] * 20}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pictures.parquet")
    flags = ("--dataset", tmp_path / "pictures.parquet", "--image-size", "32", "--batch-size", "8", "--max-steps", "2")
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", "localhost:0", "scripts/train.py", *TINY, *flags, "--output-dir", tmp_path / "run"]
    done = run_process(*words, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "home").rglob("*.arrow"))) == 1
