"""Runs with virtual processes have the same weights, to the bit, for any number of processes."""

from pathlib import Path

from chaos import FLAGS, Training, differences, torment
from pytest import mark, param, raises

from resnext_hub.errors import RequestError
from resnext_hub.files import sha256_of
from resnext_hub.record import RunRecord
from resnext_hub.runs.checks import check_batch
from resnext_hub.runs.elastic import resolve_elastic
from resnext_hub.training.config import TrainConfig

EVERYTHING = (*FLAGS, "--elastic", "4", "--drop-path", "0.2", "--random-erasing", "0.3", "--clip-grad", "1")
"""Mixing, moving average, dropout, stochastic depth and erasing, with 4 virtual processes of 12 images."""


def trained(folder: Path, processes: int, *flags: str) -> Path:
    run = Training(folder / f"of-{processes}", processes, 20, flags)
    run.finish()
    return run.folder


@mark.slow
@mark.parametrize(
    "flags",
    [
        EVERYTHING,
        param((*EVERYTHING, "--micro-batch-size", "5", "--class-weights", "auto"), id="micro-batches, class weights"),
        param((*EVERYTHING, "--micro-batch-size", "5", "--optimizer", "adamw", "--loss", "bce"), id="adamw, bce"),
    ],
)
def test_1_2_and_4_processes_train_the_same_weights(tmp_path: Path, flags: tuple[str, ...]) -> None:
    one, *others = (trained(tmp_path, processes, *flags) for processes in (1, 2, 4))
    for other in others:
        assert sha256_of(one / "model" / "model.safetensors") == sha256_of(other / "model" / "model.safetensors")
        assert differences(one, other) == []  # moving average, optimizer and metrics
    assert [RunRecord.load(folder / "record.json").processes for folder in (one, *others)] == [1, 2, 4]
    assert RunRecord.load(one / "record.json").config["elastic"] == 4


@mark.slow
def test_a_stream_trains_the_same_weights(tmp_path: Path) -> None:
    from resnext_hub.data.sources import load_digits_table

    digits = load_digits_table()
    for shard in range(4):
        digits.shard(4, shard).select(range(300 + shard)).to_parquet(tmp_path / "digits" / f"train-{shard}.parquet")
    digits.select(range(1700, 1797)).to_parquet(tmp_path / "digits" / "test-0.parquet")
    flags = (*EVERYTHING, "--dataset", str(tmp_path / "digits"), "--streaming", "--image-size", "32")
    one, two = (trained(tmp_path, processes, *flags) for processes in (1, 2))
    assert differences(one, two) == []


@mark.slow
@mark.parametrize("counts", [(1, 2, 1), (2, 4, 1, 2)])
def test_a_run_that_moves_between_numbers_of_processes_ends_like_one_that_does_not(
    tmp_path: Path, counts: tuple[int, ...]
) -> None:
    done, different = torment(tmp_path, counts, kills=len(counts) - 1, steps=40, seed=1, elastic=4)
    assert len(done) == len(counts) - 1
    assert different == []


@mark.parametrize(
    ("processes", "settings", "message"),
    [
        (1, {"elastic": 6}, "elastic=6: expected a power of two, such as 4 or 8"),
        (3, {"elastic": 4}, "elastic=4 cannot be divided among 3 processes; start 1, 2 or 4"),
        (8, {"elastic": 4}, "elastic=4 cannot be divided among 8 processes; start 1, 2 or 4"),
        (2, {"elastic": 4, "batch_size": 66}, "cannot be divided evenly among 4 virtual processes; use 64 or 68"),
        (2, {"elastic": 4, "batch_size": 60, "mixup": 0.2}, "gives 15 images per virtual process.* use 56 or 64"),
        (1, {"elastic": 4, "compile": True}, "elastic=4 cannot be combined with compile=True.*omit one of them"),
        (1, {"elastic": 4, "deterministic": False}, "elastic=4 cannot be combined with deterministic=False"),
    ],
)
def test_what_virtual_processes_need_is_checked(monkeypatch, processes: int, settings, message: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with raises(RequestError, match=message):
        check_batch(TrainConfig.from_flat({"batch_size": 64} | settings))


def test_nothing_open_depends_on_the_number_of_processes(monkeypatch) -> None:
    found = []
    for processes in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        found.append(resolve_elastic(TrainConfig.from_flat({"elastic": 4}), {}, "cpu"))
    assert found[0] == found[1] == found[2]
    assert (found[0].deterministic, found[0].merge_groups) == (True, "off")
    assert found[0].threads.isdigit()


def test_a_run_keeps_its_number_of_threads() -> None:
    before = {"elastic": 4, "threads": "3"}
    assert resolve_elastic(TrainConfig.from_flat({"elastic": 4}), before, "cpu").threads == "3"
    with raises(RequestError, match=r"threads=2: the run was started with 3 threads per .*use threads=3"):
        resolve_elastic(TrainConfig.from_flat({"elastic": 4, "threads": "2"}), before, "cpu")
