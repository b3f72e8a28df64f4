"""All entries train on the same images in turn, and the report says which reach the accuracy of the baseline."""

import json
import statistics
from pathlib import Path

from pytest import mark, raises
from support.processes import write_images

from resnext_hub.benchmark.time_to_accuracy import Report, Settings, Trained, mean_and_interval, measure
from resnext_hub.errors import RequestError


def report(*rows: tuple[str, tuple[float, ...], tuple[float, ...]]) -> str:
    trained = tuple(Trained(name=name, ours=False, seconds=times, accuracies=found) for name, times, found in rows)
    machine = {"processor": "a processor", "threads": 2, "versions": {"torch": "2"}}
    return Report(settings={"model": "resnext_g32", "epochs": None}, machine=machine, rows=trained).table()


def test_the_target_is_the_mean_accuracy_of_the_first_row() -> None:
    lines = report(
        ("baseline", (10.0, 12.0, 11.0), (0.90, 0.92, 0.91)),
        ("as good", (5.0, 6.0, 5.5), (0.91, 0.91, 0.91)),
        ("worse", (1.0, 1.0, 1.0), (0.90, 0.92, 0.9099)),
    ).splitlines()
    assert lines[0] == "| | accuracy | reaches 91.00 % | seconds | time relative to baseline |"
    assert [line.split(" | ")[2] for line in lines[2:5]] == ["yes", "yes", "no"]
    assert [line.split(" | ")[4].rstrip(" |") for line in lines[2:5]] == ["1.00", "0.50", "0.09"]
    assert lines[3].startswith("| as good | 91.00 ± 0.00 % |")
    assert "Settings: model resnext_g32.\n" in "\n".join(lines)


def test_a_single_run_has_no_interval() -> None:
    text = report(("baseline", (10.0,), (0.5,)))
    assert "| baseline | 50.00 % | yes | 10.0 | 1.00 |" in text
    assert "±" not in text
    assert "interval" not in text


def test_intervals_are_those_of_students_t_distribution() -> None:
    values = [1.0, 2.0, 4.0]
    half = 4.3027 * statistics.stdev(values) / 3**0.5  # 0.975 quantile for 2 degrees of freedom, from a table
    assert mean_and_interval(values, 3) == f"{statistics.fmean(values):.3f} ± {half:.3f}"


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    for values, message in (
        ({"dataset": str(tmp_path)}, "expected a folder with a subfolder train"),
        ({"recipe": "slow"}, "does not exist"),
        ({"model": "resnet50"}, "is not a variant"),
        ({"timm_checkout": str(tmp_path)}, "contains no train.py"),
    ):
        with raises(RequestError, match=message):
            Settings(**values)  # type: ignore[arg-type]


@mark.slow
def test_all_entries_train_on_the_same_images_and_all_their_time_counts(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for name, shade in (("dark", 60), ("bright", 190)):
            write_images(tmp_path / split / name, 16, shade)
    settings = Settings(
        dataset=str(tmp_path), model="resnext26_g32", epochs=1, ablation=True, baseline_epochs=1, batch_size=16
    )
    found = measure(settings, rounds=1)
    names = [row.name for row in found.rows]
    assert names == ["bare loop", "ours, recipe fast", "ours, without progressive size", "ours, without optimizer"]
    assert all(0 <= accuracy <= 1 for row in found.rows for accuracy in row.accuracies)
    assert all(seconds > 1 for row in found.rows for seconds in row.seconds)  # no process imports torch in less
    content = json.loads(found.to_json())
    assert content["kind"] == "time-to-accuracy"
    assert [row["accuracies"] for row in content["rows"]] == [list(row.accuracies) for row in found.rows]
