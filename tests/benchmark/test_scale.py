"""Predictions follow from the constants of the machine, and are shown beside what was measured."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from pytest import approx, mark, raises

from resnext_hub.benchmark.scale import Check, Constants, Report, Settings, fit, measure, predict
from resnext_hub.errors import RequestError

MACHINE = Constants(
    import_seconds=5.0,
    import_bytes=9e8,
    open_seconds=(0.5, 1e-5, 1e-4),
    open_bytes=(1e6, 300.0, 1000.0),
    reduce_seconds=1e-4,
    reduce_rate=1e9,
    cores=4,
    waited=1.0,
)


def test_costs_per_image_and_per_class_are_found_from_three_sizes() -> None:
    sizes = ((2_000, 10), (20_000, 10), (20_000, 2_000))
    costs = [0.5 + 2e-5 * images + 3e-4 * classes for images, classes in sizes]
    assert fit(sizes, costs) == approx((0.5, 2e-5, 3e-4))
    assert min(fit(sizes, [3.0, 2.0, 1.0])) >= 0  # however noisy the measurements are


def test_a_prediction_is_linear_in_images_and_classes() -> None:
    found = predict(MACHINE, Settings(images=10**6, classes=1000, processes=2, image_bytes=1000), parameters=25_000_000)
    assert found.start_seconds == approx(5.0 + 0.5 + 10.0 + 0.1)
    assert found.memory_bytes == approx(9e8 + 1e6 + 3e8 + 1e6 + 4e8)
    assert found.read_bytes == approx(5e8)
    assert found.reduce_seconds == approx(2 * (1e-4 + 0.05))


def test_processes_that_wait_for_a_core_start_and_sum_later() -> None:
    few, many = (predict(MACHINE, Settings(processes=number), parameters=1000) for number in (4, 8))
    assert many.start_seconds - few.start_seconds == approx(5.0)  # only one process of the host opens the dataset
    assert many.memory_bytes == few.memory_bytes
    assert many.reduce_seconds == approx(2 * 14 * (1e-4 + 500 / 1e9))
    assert predict(MACHINE, Settings(processes=1), parameters=1000).reduce_seconds == 0


def test_the_report_shows_each_check_and_the_worst_ratio() -> None:
    settings = Settings(images=500, classes=5, processes=2)
    checks = (
        Check(what="startup, s", predicted=2.0, measured=1.6),
        Check(what="memory, MB", predicted=9, measured=15),
    )
    report = Report(
        settings=settings,
        machine={"processor": "a processor", "versions": {"torch": "2"}},
        constants=MACHINE,
        prediction=predict(MACHINE, settings, parameters=0),
        checks=checks,
    )
    text = report.table()
    assert "| startup, s | 2 | 1.6 | 1.25 |" in text
    assert "within a factor of 1.67 of the 2 measurements" in text
    assert "Warning" not in text
    busy = dataclasses.replace(report, constants=dataclasses.replace(MACHINE, waited=3.04))
    assert "Warning: startup took 3.0x its CPU time" in busy.table()
    assert json.loads(report.to_json())["prediction"] == dataclasses.asdict(report.prediction)


def test_a_model_that_is_no_variant_is_refused() -> None:
    with raises(RequestError, match="model=resnet50 is not a variant"):
        measure(Settings(model="resnet50"), 1)


@mark.slow
def test_the_command_checks_its_predictions(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    code, out, err = command("benchmark", "scale", "--rounds", 1, "--largest", 1000, "--json", file)
    assert code == 0, err
    report = json.loads(file.read_text())
    checks = {check["what"]: check for check in report["checks"]}
    assert len(checks) == 3 * 4 + 2
    for images in (10, 100, 1000):  # files are read whole and once
        read = checks[f"{images:,} images, {max(2, images // 100)} classes: read, MB"]
        assert read["predicted"] == approx(read["measured"], rel=0.05)
    assert "| startup |" in out
