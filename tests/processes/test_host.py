"""What one process of a host has computed, the others on it use; processes of other hosts compute it themselves."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pytest import mark
from support import warm_start
from support.layouts import folders, metadata, parquet
from support.processes import ROOT

from resnext_hub.data.config import DataConfig
from resnext_hub.data.splits import load_splits
from resnext_hub.processes.host import read_shared, write_shared

LOAD = """
import json, os, sys
listed = []
sys.addaudithook(lambda event, arguments: event == "os.scandir" and listed.append(str(arguments[0])))
from resnext_hub.data.config import DataConfig
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError
from resnext_hub.processes import peers as agreement
from resnext_hub.processes.host import once_per_host

peers = agreement.join()
found = {}
try:
    splits = once_per_host(peers, lambda: load_splits(DataConfig(dataset=sys.argv[1])))
    with open("/proc/self/maps") as maps:
        found["mapped"] = sum("/resnext-hub-" in line for line in maps)
    found["images"] = [splits.train.row(index)["path"] for index in range(len(splits.train))]
    found["labels"] = splits.train.labels.tolist()
    found["fingerprint"] = splits.fingerprint
    splits.train.labels[:] = 0  # a copy, whatever the other processes do
except RequestError as error:
    found["error"] = str(error)
found["listed"] = sum(folder.startswith(sys.argv[1]) for folder in listed)
found["again"] = peers.gather(found.get("labels"))[0] == found.get("labels")
print(json.dumps(found))
"""


def load_in_two(tmp_path: Path, dataset: Path, local: tuple[int, int]) -> list[dict[str, Any]]:
    """Load a dataset in two processes; return what each found.

    Args:
        tmp_path: The folder for temporary files.
        dataset: The dataset.
        local: Index of each process on its host; both have 0 on different hosts.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [
        warm_start.Popen(
            [sys.executable, "-c", LOAD, str(dataset)],
            cwd=ROOT,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(own), "LOCAL_WORLD_SIZE": str(max(local) + 1)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(local)
    ]
    texts = [process.communicate(timeout=240)[0] for process in started]
    return [json.loads(text) for text in texts]


@mark.parametrize("local", [(0, 1), (0, 0)])
def test_a_folder_is_listed_once_per_host(tmp_path: Path, local: tuple[int, int]) -> None:
    dataset = folders(tmp_path / "data")
    (tmp_path / "aside").mkdir()
    first, second = load_in_two(tmp_path / "aside", dataset, local)
    expected = load_splits(DataConfig(dataset=str(dataset)))
    for found in (first, second):
        assert found["images"] == [expected.train.row(index)["path"] for index in range(len(expected.train))]
        assert found["labels"] == expected.train.labels.tolist()
        assert found["fingerprint"] == expected.fingerprint
        assert found["again"]
    one_host = local == (0, 1)
    assert first["listed"] > 0
    assert (second["listed"] == 0) == one_host
    assert (first["mapped"] > 0, second["mapped"] > 0) == (one_host, one_host)
    assert not list((tmp_path / "aside").glob("resnext-hub-*"))  # removed once it is mapped


def test_a_dataset_that_cannot_be_loaded_is_refused_in_all_processes(tmp_path: Path) -> None:
    first, second = load_in_two(tmp_path, tmp_path / "missing", (0, 1))
    assert "does not exist" in first["error"]
    assert second["error"].endswith(first["error"])


@mark.parametrize(
    "write", [folders, parquet("train.parquet", "test.parquet"), metadata], ids=["folders", "parquet", "table"]
)
def test_what_is_shared_is_what_was_loaded(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    splits = load_splits(DataConfig(dataset=str(write(tmp_path / "data")), group_duplicates=False))
    write_shared(tmp_path / "shared", splits)
    found = read_shared(tmp_path / "shared")
    assert (found.label_names, found.fingerprint, found.found) == (splits.label_names, splits.fingerprint, splits.found)
    for part, images in (("train", splits.train), ("eval", splits.eval)):
        mapped = getattr(found, part)
        assert (mapped.indices == images.indices).all()
        assert (mapped.labels == images.labels).all()
        assert [mapped.row(index) for index in range(len(mapped))] == [images.row(i) for i in range(len(images))]


def test_no_python_object_is_kept_for_an_image(tmp_path: Path) -> None:
    def objects(count: int) -> int:
        """Return the bytes of a dataset as objects, without those in arrays and Arrow tables."""
        for name in ("bus", "car"):
            (tmp_path / str(count) / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / str(count) / name / f"{number:06}.png").touch()
        splits = load_splits(DataConfig(dataset=str(tmp_path / str(count)), group_duplicates=False))
        return len(pickle.dumps(splits, protocol=5, buffer_callback=lambda buffer: None))

    assert abs(objects(2000) - objects(20)) < 200


def test_the_memory_of_mapped_arrays_is_shared_until_it_is_changed(tmp_path: Path) -> None:
    values = {"array": np.arange(1000), "table": datasets.Dataset.from_dict({"a": list(range(1000))})}
    write_shared(tmp_path / "shared", values)
    found = read_shared(tmp_path / "shared")
    assert not found["array"].flags.owndata
    found["array"][0] = 7
    assert read_shared(tmp_path / "shared")["array"][0] == 0
    assert found["table"][999] == {"a": 999}
