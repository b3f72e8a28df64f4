"""Benchmarks: every entry is measured with its error, and failures are reported in one line."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pytest import approx, mark, raises

from resnext_hub.benchmark.comparison import Comparison, Entry, Result, equal_flops_model, in_own_process
from resnext_hub.errors import RequestError, RunError

Command = Callable[..., tuple[int, str, str]]

TINY = ("--model", "test_resnet", "--equal-flops", "test_resnet", "--image-size", 64, "--batch-size", 2)


@mark.slow
def test_all_entries_compute_the_same_and_the_json_has_every_round(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "inference.json"
    code, out, err = command("benchmark", "inference", *TINY, "--rounds", 2, "--json", file, "--threads", 1)
    assert code == 0, err
    report = json.loads(file.read_text())
    assert report["kind"] == "inference"
    assert report["settings"]["image_size"] == 64
    assert report["machine"]["threads"] == 1
    rows = {row["name"]: row for row in report["rows"]}
    assert {"timm, eager, float32", "ONNX Runtime, float32"} <= rows.keys()
    assert sum(row["ours"] for row in report["rows"]) >= 1
    for name, row in rows.items():
        assert f"| {name} | {row['median_images_per_second']:.1f} |" in out
        assert row["median_images_per_second"] == approx(median(row["images_per_second"]))
        assert len(row["images_per_second"]) == 2
        times = [1000 * seconds for round_ in row["one_image_seconds"] for seconds in round_]
        assert len(row["one_image_seconds"]) == 2
        assert row["one_image_ms"]["p50"] == approx(median(times))
        assert median(times) <= row["one_image_ms"]["p99"] <= max(times)
        assert f" | {row['one_image_ms']['p50']:.2f} | {row['one_image_ms']['p99']:.2f} | {row['quality']} |" in out
        error = re.match(r"error (\S+)", row["quality"])
        if error:  # the model of equal FLOPs has none
            assert float(error[1]) < (0.3 if "int8" in name else 0.05), name
    assert "Medians of 2 interleaved rounds" in out


def test_a_speedup_is_the_median_over_rounds_of_the_ratio() -> None:
    slow = Result(name="slow", ours=False, quality="", images_per_second=(10.0, 20.0, 40.0))
    fast = Result(name="fast", ours=True, quality="error 1e-3", images_per_second=(20.0, 30.0, 120.0))
    assert fast.speedup(slow) == 2.0
    machine = {"processor": "P", "threads": 1, "versions": {"torch": "2"}}
    table = Comparison(kind="k", settings={"size": 1}, machine=machine, rows=(slow, fast)).table()
    assert "| speedup of fast |" in table
    assert "| slow | 20.0 | 2.00 |  |" in table
    assert "| fast | 30.0 |  | error 1e-3 |" in table


def test_the_time_of_an_image_is_compared_within_each_round() -> None:
    slow = Result(name="slow", ours=False, quality="", images_per_second=(1.0,), latencies=((0.2, 0.2), (0.4, 0.4)))
    fast = Result(name="fast", ours=True, quality="", images_per_second=(1.0,), latencies=((0.1, 0.1), (0.1, 0.3)))
    assert fast.latency_ratio(slow) == approx(0.5)
    machine = {"processor": "P", "threads": 1, "versions": {"torch": "2"}}
    comparison = Comparison(kind="k", settings={"size": 1}, machine=machine, rows=(slow, fast))
    assert "| fast | 1.0 |  | 100.00 | 300.00 |  |" in comparison.table()
    assert json.loads(comparison.to_json())["rows"][1]["one_image_time_over"] == {"slow": approx(0.5)}


def build_working_entry(rate: float) -> Entry:
    return Entry(name=f"process {os.getpid()}", run=lambda: rate, quality="exact", ours=True)


def build_dying_entry() -> Entry:
    os._exit(1)


def build_failing_entry(error: Exception) -> Entry:
    raise error


def test_an_entry_runs_in_own_process_which_ends_with_the_comparison() -> None:
    with in_own_process("one", build_working_entry, 3.5) as entry:
        assert (entry.run(), entry.run()) == (3.5, 3.5)
        process = int(entry.name.split()[1])
        assert process != os.getpid()
        os.kill(process, 0)
    with raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_entry_that_fails_or_dies_is_reported_in_one_line() -> None:
    with raises(RunError, match="process of the benchmark entry one died"), in_own_process("one", build_dying_entry):
        pass
    with in_own_process("one", build_working_entry, 3.5) as entry:
        os.kill(int(entry.name.split()[1]), signal.SIGKILL)
        with raises(RunError, match="process of the benchmark entry one died"):
            entry.run()
    for error, expected in (
        (RequestError("no such model"), raises(RequestError, match=r"^no such model$")),
        (RuntimeError("out of\nmemory"), raises(RunError, match=r"^the benchmark entry one failed: out of memory$")),
    ):
        with expected, in_own_process("one", build_failing_entry, error):
            pass


def test_invalid_settings_are_reported_in_one_line(command: Command, tmp_path: Path) -> None:
    for arguments, part in (
        (("inference", "--model", "resnext_g33"), "resnext_g33 is not a timm model"),
        (("inference", "--batch-size", 0), "--batch-size 0: expected a whole number from 1 to"),
        (("speed",), "speed is not one of inference, training, checkpoints, time-to-accuracy, loader, scale"),
        (("loader", "--batch-size", 0), "--batch-size 0: expected a whole number from 1 to"),
        (("loader", "--image-size", -3), "--image-size -3: expected a whole number from 1 to"),
        (("loader", "--workers", -1), "--workers -1: expected a whole number from 0 to"),
        (("loader", "--images", tmp_path), "expected a folder with images"),
        (("loader", "--json", tmp_path / "no" / "x.json"), "x.json: expected a file in an existing, writable folder"),
        (("training", "--image-size", 16), "resnext_g32 does not accept --image-size 16"),
        (("training", "--equal-flops", "resnext_g33"), "resnext_g33 is not a timm model"),
    ):
        code, _, err = command("benchmark", *arguments)
        assert code == 2
        assert part in err
        assert err.count("\n") == 1


@mark.parametrize(
    ("model", "plain"),
    [
        ("resnext_g32", "resnet50"),
        ("resnext26_g32", "resnet26"),
        ("resnext101_g64_w4", "resnext101_g1_w100"),
        ("resnext101_g32_w8", "resnext101_g1_w100"),
        ("resnext29_g8_w64", None),
        ("regnety_002", None),
    ],
)
def test_the_model_without_groups_has_about_equal_flops(model: str, plain: str | None) -> None:
    assert equal_flops_model(model) == plain


def test_the_loader_benchmark_skips_unreadable_images(command: Command, folder_of_classes: Path) -> None:
    (folder_of_classes / "bus" / "unreadable.png").write_bytes(b"no image")
    flags = ("--image-size", 32, "--workers", 0, "--batch-size", 4, "--rounds", 1, "--images", folder_of_classes)
    code, out, err = command("benchmark", "loader", *flags)
    assert code == 0, err
    assert "skipping unreadable image" in err
    assert "unreadable.png: not an image" in err
    assert "30 images of" in out


def test_unsteady_rounds_add_a_warning() -> None:
    machine = {"processor": "P", "threads": 1, "versions": {"torch": "2"}}
    for last, warned in ((14.0, False), (16.0, True)):
        row = Result(name="one", ours=True, quality="", images_per_second=(10.0, last))
        table = Comparison(kind="k", settings={}, machine=machine, rows=(row,)).table()
        assert ("differ by up to 1.6x; other processes were probably running on this machine" in table) == warned
