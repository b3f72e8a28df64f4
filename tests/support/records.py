"""Records of runs that nobody trained, and the ways in which a file can be damaged."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resnext_hub.facts import DatasetFacts, EvaluationFacts, HardwareFacts, ModelFacts, SampleFacts
from resnext_hub.record import RunRecord
from resnext_hub.training.config import TrainConfig


def a_record(
    names: Sequence[str] = ("bus", "car", "train"),
    confusion: Sequence[Sequence[tuple[int, int]]] = ([(0, 3), (1, 1)], [(1, 4)], [(2, 4)]),
    **values: Any,
) -> RunRecord:
    """Make a record of a run whose evaluation gave a confusion matrix."""
    count = sum(n for row in confusion for _, n in row)
    correct = sum(n for label, row in enumerate(confusion) for column, n in row if column == label)
    config = TrainConfig().to_flat() | {"dataset": "vehicles", "lr": 0.01}
    facts: dict[str, Any] = dict(
        name="vehicles-test_resnet",
        config=config,
        changed=["dataset", "lr"],
        command="accelerate launch scripts/train.py --dataset vehicles --lr 0.01",
        model=ModelFacts(
            requested="test_resnet",
            architecture="test_resnet",
            model_args={},
            needs_plugin=False,
            parameters=100,
            variant=None,
            template=None,
            input={"input_size": [3, 32, 32]},
            weights_sha256="0" * 64,
        ),
        base_model=None,
        dataset=DatasetFacts(
            id="vehicles",
            hub_id=None,
            revision=None,
            fingerprint="f" * 64,
            train_split="train",
            eval_split=None,
            train_count=100,
            eval_count=count,
            train_counts=[100 // len(names)] * len(names),
            eval_counts=[sum(n for _, n in row) for row in confusion],
        ),
        label_names=list(names),
        steps=20,
        epochs=2.0,
        evaluation=EvaluationFacts(
            step=20,
            epoch=2.0,
            correct=correct,
            count=count,
            top1=correct / count,
            loss=0.5,
            top5=None,
            macro_f1=0.8,
            calibration_error=0.1,
            batch_size=32,
            confusion=[list(row) for row in confusion],
        ),
        sample=SampleFacts(index=0, label=names[0], output=[(names[0], 0.9)]),
        history=[],
        versions={"torch": "2"},
        hardware=HardwareFacts(device="cpu", name="a processor", threads=1, mixed_precision="no"),
        processes=1,
        git_commit=None,
        wall_seconds=9.0,
        resumes=0,
        skipped_steps=0,
    )
    return RunRecord(**facts | values)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "a number": lambda content: b"7",
    "a text": lambda content: b'"x"',
    "no keys": lambda content: b"{}",
    "an unknown key": lambda content: b'{"sparkle": 1}',
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "binary": lambda content: bytes(range(256)) * 9,
    "NUL bytes": lambda content: bytes(len(content)),
    "brackets": lambda content: b"[" * 200_000,
    "twice": lambda content: content + content,
}
"""What becomes of a file's content, by name."""


def replace_by(path: Path, kind: str) -> None:
    """Put something else than a file in a file's place."""
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dangling link": "gone", "link loop": path.name}[kind])


NO_FILES = ("FIFO", "folder", "device", "dangling link", "link loop")
