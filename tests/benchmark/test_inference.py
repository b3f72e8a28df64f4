"""The benchmark lets real contenders compute the same, and tells of each how fast and how far off it is."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pytest import approx

from resnext_hub.benchmark.contest import Contest, Row

Command = Callable[..., tuple[int, str, str]]

TINY = ("--model", "test_resnet", "--equal-flops", "test_resnet", "--image-size", 64, "--batch-size", 2)


def test_all_contenders_compute_the_same_and_the_json_tells_every_round(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "inference.json"
    code, out, err = command("benchmark", "inference", *TINY, "--rounds", 2, "--json", file, "--threads", 1)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found["kind"] == "inference"
    assert found["settings"]["image_size"] == 64
    assert found["machine"]["threads"] == 1
    rows = {row["name"]: row for row in found["rows"]}
    assert {"timm, as it comes (eager, float32)", "ONNX Runtime, float32"} <= rows.keys()
    assert sum(row["ours"] for row in found["rows"]) >= 1
    for name, row in rows.items():
        assert f"| {name} | {row['median_images_per_second']:.1f} |" in out
        assert row["median_images_per_second"] == approx(median(row["images_per_second"]))
        assert len(row["images_per_second"]) == 2
        error = re.match(r"error (\S+)", row["quality"])
        if error:  # the network of equal FLOPs is another one
            assert float(error[1]) < (0.3 if "int8" in name else 0.05), name
    assert "Medians of 2 rounds" in out


def test_ratios_are_medians_of_the_rounds_ratios() -> None:
    slow = Row(name="slow", ours=False, quality="", images_per_second=(10.0, 20.0, 40.0))
    fast = Row(name="fast", ours=True, quality="error 1e-3", images_per_second=(20.0, 30.0, 120.0))
    assert fast.times(slow) == 2.0
    machine = {"processor": "P", "threads": 1, "versions": {"torch": "2"}}
    table = Contest(kind="k", settings={"size": 1}, machine=machine, rows=(slow, fast)).table()
    assert "| slow | 20.0 | 2.00 |  |" in table
    assert "| fast | 30.0 |  | error 1e-3 |" in table


def test_what_cannot_be_measured_is_refused_in_a_line(command: Command) -> None:
    for arguments, part in (
        (("inference", "--model", "resnext_g33"), "resnext_g33: timm knows no such network"),
        (("inference", "--batch-size", 0), "expected at least 1"),
        (("speed",), "invalid choice: 'speed'"),
    ):
        code, _, err = command("benchmark", *arguments)
        assert code == 2
        assert part in err
        assert err.count("\n") == 1
