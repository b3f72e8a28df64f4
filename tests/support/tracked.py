"""What trackers have on disk: each value by name and step, as often as it is there."""

import contextlib
import json
import sqlite3
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pytest import mark
from support.runs import lines

from resnext_hub.trackers.names import TRACKERS

Values = list[tuple[str, int, float]]

INSTALLED = tuple(name for name in TRACKERS if find_spec(name))
"""The trackers that can be tested: Trackio needs an older Pillow than other tests, and MLflow is large."""

needs_trackio = mark.skipif("trackio" not in INSTALLED, reason="trackio is not installed")
needs_mlflow = mark.skipif("mlflow" not in INSTALLED, reason="mlflow is not installed")

CLOCK = ("train/images_per_second", "train/data_wait")
"""What is different when a step is repeated."""


def expected(run: Path) -> Values:
    """Return the numbers in metrics.jsonl under the names that trackers show."""
    found = []
    for line in lines(run / "metrics.jsonl"):
        kind = "eval" if "eval_loss" in line else "train"
        for name, value in line.items():
            if name != "step" and not isinstance(value, list):
                found.append((f"{kind}/{name.removeprefix('eval_')}", line["step"], value))
    return sorted(found)


def without_clock(values: Values) -> Values:
    return [(name, step, value) for name, step, value in values if name not in CLOCK]


def tensorboard(run: Path) -> Values:
    """Return the scalars in the event files, which hold them in single precision."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = []
    for file in (run / "trackers" / "tensorboard").rglob("events.*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.append((value.tag, event.step, value.simple_value))
    return sorted(found)


def trackio(folder: Path) -> Values:
    """Return the numbers in the databases of a TRACKIO_DIR."""
    found = []
    for file in folder.glob("*.db"):
        with contextlib.closing(sqlite3.connect(file)) as database, contextlib.suppress(sqlite3.OperationalError):
            for step, metrics in database.execute("SELECT step, metrics FROM metrics"):  # there may be no table yet
                for name, value in json.loads(metrics).items():
                    if not isinstance(value, dict):
                        found.append((name, step, value))
    return sorted(found)


def wandb(run: Path) -> Values:
    """Return the numbers in the offline files."""
    found = []
    for file in (run / "trackers" / "wandb").glob("offline-run-*/*.wandb"):
        for record in _records(file.read_bytes()):
            items = record.history.item
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            for name, value in values.items():
                if name.startswith(("train/", "eval/")):
                    found.append((name, record.history.step.num, value))
    return sorted(found)


def _records(content: bytes) -> Iterator[object]:
    """Parse the log of records that wandb shares with LevelDB: blocks of 32 KiB, and records in up to several parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""  # after the header of the file
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def mlflow(run: Path) -> Values:
    """Return the metrics in the database of the run folder."""
    with contextlib.closing(sqlite3.connect(run / "trackers" / "mlflow" / "mlflow.db")) as database:
        return sorted(database.execute("SELECT key, step, value FROM metrics"))
