"""Every documented layout is read with `--dataset PATH` alone: the right number of images, the right class names."""

from pathlib import Path

from pytest import mark
from support.layouts import LAYOUTS
from support.processes import run_process

from resnext_hub.data.config import DataConfig
from resnext_hub.data.splits import load_splits
from resnext_hub.record import RunRecord


@mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_with_the_right_counts_and_names(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    found = load_splits(DataConfig(dataset=str(layout.write(tmp_path / "data")), eval_fraction=0.25))
    assert found.label_names == layout.names
    assert (len(found.train), len(found.eval)) == (layout.train, layout.eval)
    for images in (found.train, found.eval):
        assert {images.image(index).size for index in range(len(images))} == {(40, 40)}


@mark.slow
@mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_with_the_dataset_flag_alone(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    words = [
        *("--dataset", layout.write(tmp_path / "data"), "--output-dir", tmp_path / "run"),
        *("--model", "test_resnet", "--image-size", "32", "--max-steps", "1", "--batch-size", "4", "--threads", "1"),
    ]
    done = run_process("-m", "resnext_hub", "train", *words)
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(tmp_path / "run/record.json")
    assert tuple(record.label_names) == layout.names
