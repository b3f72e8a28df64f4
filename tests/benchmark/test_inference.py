"""The benchmark lets real contenders compute the same, and tells of each how fast and how far off it is."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pytest import approx, mark, raises

from resnext_hub.benchmark.contest import Contender, Contest, Row, equal_in_flops, in_its_own_process
from resnext_hub.errors import RequestError, RunError

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


def build_what_works(rate: float) -> Contender:
    return Contender(name=f"process {os.getpid()}", run=lambda: rate, quality="exact", ours=True)


def build_what_dies() -> Contender:
    os._exit(1)


def build_what_fails(error: Exception) -> Contender:
    raise error


def test_a_contender_has_a_process_of_its_own_that_ends_with_the_contest() -> None:
    with in_its_own_process("one", build_what_works, 3.5) as contender:
        assert (contender.run(), contender.run()) == (3.5, 3.5)
        process = int(contender.name.split()[1])
        assert process != os.getpid()
        os.kill(process, 0)
    with raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_contender_that_fails_or_dies_is_said_in_a_line() -> None:
    with raises(RunError, match="process of a contender has died: one"), in_its_own_process("one", build_what_dies):
        pass
    with in_its_own_process("one", build_what_works, 3.5) as contender:
        os.kill(int(contender.name.split()[1]), signal.SIGKILL)
        with raises(RunError, match="process of a contender has died: one"):
            contender.run()
    for error, said in (
        (RequestError("no such network"), raises(RequestError, match=r"^no such network$")),
        (RuntimeError("out of\nmemory"), raises(RunError, match=r"^a contender has failed: one: out of memory$")),
    ):
        with said, in_its_own_process("one", build_what_fails, error):
            pass


def test_what_cannot_be_measured_is_refused_in_a_line(command: Command, tmp_path: Path) -> None:
    for arguments, part in (
        (("inference", "--model", "resnext_g33"), "resnext_g33: timm knows no such network"),
        (("inference", "--batch-size", 0), "--batch-size 0: expected a whole number from 1 to"),
        (("speed",), "speed is not one of inference, training, loader"),
        (("loader", "--batch-size", 0), "--batch-size 0: expected a whole number from 1 to"),
        (("loader", "--image-size", -3), "--image-size -3: expected a whole number from 1 to"),
        (("loader", "--workers", -1), "--workers -1: expected a whole number from 0 to"),
        (("loader", "--images", tmp_path), "expected a folder with images"),
        (("loader", "--json", tmp_path / "no" / "x.json"), "x.json: expected a file in a folder that is there"),
        (("training", "--image-size", 16), "resnext_g32 does not take --image-size 16"),
        (("training", "--equal-flops", "resnext_g33"), "resnext_g33: timm knows no such network"),
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
def test_the_network_without_groups_costs_as_many_flops(model: str, plain: str | None) -> None:
    assert equal_in_flops(model) == plain


def test_images_that_cannot_be_read_are_left_out_of_the_loaders_benchmark(
    command: Command, folder_of_classes: Path
) -> None:
    (folder_of_classes / "bus" / "broken.png").write_bytes(b"no image")
    flags = ("--image-size", 32, "--workers", 0, "--batch-size", 4, "--rounds", 1, "--images", folder_of_classes)
    code, out, err = command("benchmark", "loader", *flags)
    assert code == 0, err
    assert "broken.png is left out, as it cannot be read: not an image" in err
    assert "30 images of" in out


def test_a_machine_that_did_other_work_is_told_of() -> None:
    machine = {"processor": "P", "threads": 1, "versions": {"torch": "2"}}
    for last, said in ((14.0, False), (16.0, True)):
        row = Row(name="one", ours=True, quality="", images_per_second=(10.0, last))
        table = Contest(kind="k", settings={}, machine=machine, rows=(row,)).table()
        assert ("differ by up to 1.6 times: the machine did other work beside" in table) == said
