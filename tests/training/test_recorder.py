"""JSON Lines files survive damage, and unreadable images are counted by index."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from pytest import mark, raises
from support.processes import TINY, write_images

from resnext_hub.data.batches import Unreadable
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.errors import RequestError, RunError
from resnext_hub.facts import UnreadableImage
from resnext_hub.models.input_config import InputConfig
from resnext_hub.processes.peers import Peers
from resnext_hub.run_folder import RunFolder
from resnext_hub.training.evaluation import evaluate
from resnext_hub.training.feed import require_readable
from resnext_hub.training.metrics import METRICS, LineLog, read_lines
from resnext_hub.training.unreadable import UnreadableLog, read_unreadable

Command = Callable[..., tuple[int, str, str]]

INPUT = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)
STEP = {"step": 1, "epoch": 0.5, "loss": 1.0, "lr": 0.1, "images_per_second": 3.0}
EVALUATION = {"step": 2, "epoch": 1, "eval_loss": 0.5, "eval_top1": 0.25, "eval_correct": 1, "eval_count": 4}

DAMAGE = [
    b"\xff\xfe\x00binary",
    b"",
    b"null",
    b"[1, 2]",
    b'"text"',
    b"{}",
    b'{"step": "1", "epoch": 0, "loss": 1, "lr": 1}',
    b'{"step": 1}',
    b'{"step": 1, "epoch": 0.5, "loss": NaN, "lr": 0.1}',
    b'{"step": 1, "epoch": 0.5, "loss": null, "lr": 0.1}',
    b'{"step": 1, "epoch": [], "eval_loss": 1, "eval_top1": 1}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"step": 1, "epoch": 0.5, "lo',
]


@mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:24]))
def test_only_the_damaged_line_of_a_file_is_lost(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(line).encode() for line in (STEP, EVALUATION)]
    for lines in ([damage, *good], [good[0], damage, good[1]], [*good, damage]):
        path.write_bytes(b"\n".join(lines) + b"\n")
        assert read_lines(path, *METRICS) == [STEP, EVALUATION]
    with LineLog(path, 2, kinds=METRICS) as log:
        log.write(**STEP | {"step": 3})
    assert [line["step"] for line in read_lines(path, *METRICS)] == [1, 2, 3]


def test_a_truncated_last_line_is_ignored_and_one_without_a_newline_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(STEP) + "\n" + json.dumps(EVALUATION)[:-9])
    assert read_lines(path, *METRICS) == [STEP]
    path.write_text(json.dumps(STEP) + "\n" + json.dumps(EVALUATION))
    assert read_lines(path, *METRICS) == [STEP, EVALUATION]


def test_a_path_that_is_not_a_regular_file_is_refused_by_name(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "nowhere", *METRICS) == []
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with raises(RunError, match=f"{path.name} cannot be read .*; remove it and rerun the same command"):
            read_lines(path, *METRICS)


@mark.parametrize("key", ["image", "picture"])  # the second before version 0.3
@mark.parametrize("damage", [*DAMAGE, b'{"split": "other", "image": "a", "reason": "b"}', b'{"image": "a"}'])
def test_damaged_lists_of_unreadable_images_do_not_stop_a_run(damage: bytes, key: str, tmp_path: Path) -> None:
    older = {"split": "training", key: "cat/1.png", "reason": "zero bytes"}
    (tmp_path / "unreadable-3.jsonl").write_bytes(damage + b"\n" + json.dumps(older).encode() + b"\n")
    log = UnreadableLog(RunFolder(tmp_path), Peers(), 0.5)
    log.note("training", 10, [Unreadable(4, "cat/1.png", "zero bytes"), Unreadable(5, "dog/2.png", "cut off")])
    expected = [
        UnreadableImage(split="training", image="cat/1.png", reason="zero bytes"),
        UnreadableImage(split="training", image="dog/2.png", reason="cut off"),
    ]
    assert read_unreadable(RunFolder(tmp_path)) == expected  # entries of older versions are identified by name


def test_images_with_the_same_name_are_counted_by_index(tmp_path: Path) -> None:
    log = UnreadableLog(RunFolder(tmp_path), Peers(), 0.1)
    unreadable = [Unreadable(index, "image.png", "zero bytes") for index in range(40)]
    log.note("training", 100, unreadable[:10])
    log.note("training", 100, unreadable[:10])  # again in the next epoch
    with raises(RunError, match=r"11 of 100 images of the training split are unreadable, more than max_bad_fr"):
        log.note("training", 100, unreadable[:11])
    assert len(read_unreadable(RunFolder(tmp_path))) == 11
    resumed = UnreadableLog(RunFolder(tmp_path), Peers(), 0.1)
    resumed.note("training", 100, unreadable[:2])  # the others may have been fixed
    assert len(read_unreadable(RunFolder(tmp_path))) == 11


def test_unreadable_images_of_other_processes_count_in_evaluation(tmp_path: Path) -> None:
    log = UnreadableLog(RunFolder(tmp_path), Peers(), 0.3)
    log.note("evaluation", 100, [Unreadable(0, "a", "cut off")], total=30)
    with raises(RunError, match="40 of 100 images of the evaluation split"):
        log.note("evaluation", 100, [], total=40)


def test_names_are_printable_in_the_list_and_the_error(tmp_path: Path) -> None:
    log = UnreadableLog(RunFolder(tmp_path), Peers(), 0.0)
    with raises(RunError) as caught:
        log.note("training", 2, [Unreadable(i, f"a\n\x1b[1m\udce9{i}.png", "odd\treason") for i in range(2)])
    assert "a\\n\\x1b[1m\\xe90.png (odd\\treason)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_unreadable(RunFolder(tmp_path))[0].image == "a\\n\\x1b[1m\\xe90.png"


def samples(data: list[bytes]) -> EvaluationSamples:
    rows = datasets.Dataset.from_dict({"image": [{"bytes": one, "path": None} for one in data]})
    images = IndexedImages(rows, "image", np.arange(len(data)), np.zeros(len(data), dtype=np.int64))
    return EvaluationSamples(images, EvalTransform(InputConfig.resolve(INPUT)))


def test_a_split_without_readable_images_raises() -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    with raises(
        RunError,
        match=r"^none of the 3 images of the evaluation split is readable; the first is index 0 \(not an image",
    ):
        evaluate(model, samples([b"x"] * 3), batch_size=2, device=torch.device("cpu"))
    with raises(
        RequestError, match=r"^none of the 3 images of the evaluation split is readable; the first is index 0 "
    ):
        require_readable(samples([b"x"] * 3))


@mark.parametrize("limit", [1.0, 0.01])
def test_a_run_without_readable_evaluation_images_is_refused_before_training(
    limit: float, tmp_path: Path, command: Command
) -> None:
    for name, shade in (("bus", 60), ("car", 160)):
        write_images(tmp_path / "set" / "train" / name, 4, shade)
        (tmp_path / "set" / "val" / name).mkdir(parents=True)
        (tmp_path / "set" / "val" / name / "1.png").write_bytes(b"no image")
    flags = ("--dataset", tmp_path / "set", "--image-size", 32, "--batch-size", 4, "--max-bad-fraction", limit)
    code, _, err = command("train", *TINY, *flags, "--output-dir", tmp_path / "run")
    assert (code, err.strip().count("\n")) == (2, 0)
    assert "none of the 2 images of the evaluation split is readable; the first is bus/1.png (not an image)" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
