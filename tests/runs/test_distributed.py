"""Runs with two processes."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pytest import fixture, mark
from support import warm_start
from support.processes import ROOT, TINY, run_interpreter, run_process

from resnext_hub.record import RunRecord

PNG = {"bytes": (ROOT / "docs" / "quickstart.png").read_bytes(), "path": None}
"""Any image."""

Start = Callable[..., "subprocess.CompletedProcess[str]"]

FLAGS = (*TINY, "--batch-size", "32", "--max-steps", "50", "--lr", "0.01", "--log-samples")


def torchrun(processes: int, *flags: object, start: Start = run_process) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", 0, "--rdzv_backend", "c10d"]
    return start(*words, "--rdzv_endpoint", "localhost:0", "scripts/train.py", *flags)


@fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pair"
    done = torchrun(2, *FLAGS, "--output-dir", folder, start=run_interpreter)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model folder:") == 1
    return folder


def samples(folder: Path, process: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"samples-{process}.jsonl").read_text().splitlines()]


@fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = run_process("scripts/train.py", *FLAGS, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_reach_the_accuracy_of_one(pair: Path, one: Path) -> None:
    """tests/runs/test_learning.py covers other launchers."""
    correct = [RunRecord.load(folder / "record.json").evaluation.correct for folder in (pair, one)]
    assert min(correct) > 200  # of 360; chance level is 36
    assert abs(correct[0] - correct[1]) <= 18


def test_the_record_states_two_processes(pair: Path) -> None:
    assert RunRecord.load(pair / "record.json").processes == 2


def test_two_processes_share_the_global_batch_of_one(pair: Path, one: Path) -> None:
    first, second, alone = samples(pair, 0), samples(pair, 1), samples(one, 0)
    assert len(first) == len(second) == len(alone) == 50
    seen: list[int] = []
    for a, b, whole in zip(first, second, alone, strict=True):
        assert len(a["indices"]) == len(b["indices"]) == 16
        assert a["indices"] + b["indices"] == whole["indices"]
        seen += whole["indices"]
    assert sorted(seen[:1437]) == list(range(1437))  # every sample once per epoch


def test_each_file_is_written_once(pair: Path) -> None:
    metrics = [json.loads(line) for line in (pair / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in metrics if "loss" in line]
    assert steps == [10, 20, 30, 40, 50]
    assert sorted(p.name for p in (pair / "checkpoints").iterdir()) == ["step-00000050"]
    assert not list(pair.rglob(".partial-*"))


def test_two_processes_count_every_evaluation_sample_once(pair: Path) -> None:
    evaluation = RunRecord.load(pair / "record.json").evaluation
    assert evaluation.count == 360
    assert evaluation.matrix.sum() == 360
    done = run_process("scripts/evaluate.py", pair)  # with one process
    assert done.returncode == 0, done.stderr
    assert "the counts of every class match" in done.stdout


def test_a_wrong_request_is_reported_once_and_no_process_hangs(tmp_path: Path) -> None:
    done = torchrun(2, *TINY, "--batch-size", 33, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("--batch-size 33 (the global batch size) cannot be divided evenly among 2 processes") == 1
    assert "use 32 or 34" in done.stderr


def stop_and_resume(folder: Path, flags: tuple[object, ...], at: int) -> tuple[list[list[int]], int, str]:
    """Stop a run of two processes after a step and finish it with one; return the samples of each step that counts."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", "localhost:0", "scripts/train.py", *map(str, flags), "--output-dir", str(folder)]
    with warm_start.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        log = folder / "samples-0.jsonl"  # its last line may be incomplete
        while not log.is_file() or log.read_bytes().count(b"\n") < at:
            assert run.poll() is None
            time.sleep(0.01)
        run.terminate()
    before = samples(folder, 0), samples(folder, 1)
    stopped = len(before[0])
    done = run_process("scripts/train.py", *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert f"resuming from step-{stopped:08d}" in done.stderr
    assert (
        "processes: 2 before the resume, 1 now; data and schedule are unchanged, but weights may differ" in done.stderr
    )
    after = samples(folder, 0)
    by_step = [line["indices"] for line in after]
    by_step[:stopped] = [a["indices"] + b["indices"] for a, b in zip(*before, strict=True)]
    record = RunRecord.load(folder / "record.json")
    assert (record.processes, record.resumes, len(by_step)) == (1, 1, record.steps)
    return by_step, stopped, done.stderr


def test_a_run_of_two_processes_resumes_with_one(tmp_path: Path) -> None:
    """Each sample occurs once per epoch, over the steps before and after the checkpoint."""
    flags = tuple("90" if flag == "50" else flag for flag in FLAGS)  # 45 steps make an epoch
    by_step, stopped, _ = stop_and_resume(tmp_path / "run", flags, at=66)
    assert 66 <= stopped < 90
    seen = [index for step in by_step for index in step]
    assert sorted(seen[:1437]) == sorted(seen[1437:2874]) == list(range(1437))


@mark.slow
def test_a_streamed_run_of_two_processes_resumes_with_one(tmp_path: Path) -> None:
    import datasets

    from resnext_hub.data.sources import load_digits_table

    digits = load_digits_table()
    for shard in range(3):
        digits.shard(3, shard).select(range(400 - shard)).to_parquet(tmp_path / "digits" / f"train-{shard}.parquet")
    digits.select(range(1700, 1797)).to_parquet(tmp_path / "digits" / "test-0.parquet")
    assert isinstance(digits.features["label"], datasets.ClassLabel)
    flags = (
        *TINY, "--dataset", tmp_path / "digits", "--streaming", "--shuffle-block", "100", "--image-size", "32",
        "--batch-size", "32", "--max-steps", "80", "--lr", "0.01", "--log-samples", "--optimizer", "adamw",
        "--mixup", "0.2",
    )  # fmt: skip
    by_step, stopped, _ = stop_and_resume(tmp_path / "run", flags, at=45)
    assert 45 <= stopped < 80
    seen = [index for step in by_step for index in step]
    counts = Counter(seen)  # 80 steps make 2.1 epochs of 1,197 samples
    assert set(counts) == set(range(1197))
    assert set(counts.values()) == {2, 3}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [38, 75, 80]  # 37.4 steps make an epoch
    assert {line["eval_count"] for line in lines if "eval_loss" in line} == {97}
    assert run_process("scripts/evaluate.py", tmp_path / "run").returncode == 0
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert (record.dataset.train_count, record.dataset.eval_count) == (1197, 97)


def test_two_processes_prepare_a_dataset_once(tmp_path: Path) -> None:
    """Both open the same parquet file at the same time; the lock of the datasets library makes one of them wait."""
    import datasets

    rows = {"image": [PNG] * 40, "label": ["a", "b"] * 20}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    flags = ("--dataset", tmp_path / "images.parquet", "--image-size", "32", "--batch-size", "8", "--max-steps", "2")
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", "localhost:0", "scripts/train.py", *TINY, *flags, "--output-dir", tmp_path / "run"]
    words += ["--no-group-duplicates"]  # all images are the same
    done = run_process(*words, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "home").rglob("*.arrow"))) == 1
