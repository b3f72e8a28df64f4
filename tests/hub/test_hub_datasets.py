"""Datasets of the Hub: what can be loaded is loaded, everything else is reported in one line."""

from collections.abc import Iterator
from pathlib import Path

import datasets
from pyarrow import parquet as parquet_file
from pytest import fixture, mark
from support.client import Client
from support.loopback_hub import Fault, LoopbackHub, Repo, serve
from support.processes import TINY

from resnext_hub.data.sources import load_digits_table

CONFIGS = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/*.parquet}]
- config_name: large
  data_files: [{split: train, path: large/*.parquet}]
---
"""


@fixture(scope="module")
def parquet(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("data") / "digits.parquet"
    load_digits_table().select(range(60)).to_parquet(path)
    return path.read_bytes()


@fixture(scope="module")
def running(tmp_path_factory) -> Iterator[tuple[LoopbackHub, Client]]:
    with serve() as hub:
        client = Client(hub, tmp_path_factory.mktemp("home"))
        yield hub, client
        client.close()


def error_of(client: Client, tmp_path: Path, *words: object, code: int = 2) -> str:
    """Train on a dataset that cannot be loaded; return the error."""
    run = ("train", *TINY, "--image-size", 32, "--max-steps", 1, "--output-dir", tmp_path / "run")
    found, out, err = client.command(*run, *words)
    assert found == code, out + err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    return err.strip().splitlines()[-1]


def dataset(hub: LoopbackHub, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
    repo = hub.create("datasets", name, private)
    repo.commit("data", files)
    return repo


@mark.parametrize("streaming", [(), ("--streaming",)], ids=["whole", "streamed"])
def test_a_private_or_gated_dataset_without_access_is_an_error(
    running: tuple[LoopbackHub, Client], parquet: bytes, tmp_path: Path, streaming: tuple[str, ...]
) -> None:
    hub, client = running
    files = {"data/train-0.parquet": parquet, "data/test-0.parquet": parquet}
    dataset(hub, "you/secret", files, private=True)
    said = error_of(client, tmp_path, "--dataset", "you/secret", *streaming)
    assert "you/secret is neither a local folder nor a dataset on the Hub that you can access" in said
    dataset(hub, "you/gated", files).granted = set()
    error = error_of(client, tmp_path, "--dataset", "you/gated", *streaming)
    assert "you/gated" in error
    assert "gated" in error


def test_private_and_gated_datasets_with_access_are_loaded(running: tuple[LoopbackHub, Client], parquet: bytes) -> None:
    hub, client = running
    dataset(hub, "me/secret", {"data/train-0.parquet": parquet}, private=True)
    dataset(hub, "you/open", {"data/train-0.parquet": parquet}).granted = {"me"}
    for name in ("me/secret", "you/open"):
        answer = client.run(
            "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
            f"splits = load_splits(DataConfig(dataset={name!r}))\n"
            "result = len(splits.train) + len(splits.eval)"
        )
        assert answer["result"] == 60, answer["err"]


def test_a_dataset_with_several_configs_needs_a_choice(
    running: tuple[LoopbackHub, Client], parquet: bytes, tmp_path: Path
) -> None:
    hub, client = running
    dataset(hub, "me/two", {"README.md": CONFIGS.encode(), "small/a.parquet": parquet, "large/a.parquet": parquet})
    said = error_of(client, tmp_path, "--dataset", "me/two")
    assert "small" in said
    assert "large" in said
    assert said.endswith("choose one with --dataset-config")
    assert "none" in error_of(client, tmp_path, "--dataset", "me/two", "--dataset-config", "none")
    answer = client.run(
        "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
        "result = len(load_splits(DataConfig(dataset='me/two', dataset_config='small')).label_names)"
    )
    assert answer["result"] == 10, answer["err"]


def test_a_revision_is_loaded_or_reported_as_unknown(
    running: tuple[LoopbackHub, Client], parquet: bytes, tmp_path: Path
) -> None:
    hub, client = running
    repo = dataset(hub, "me/moved", {"data/train-0.parquet": parquet})
    first = repo.commits[-1].oid
    repo.commit("other", {"data/train-0.parquet": b"damaged"})
    answer = client.run(
        "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
        f"splits = load_splits(DataConfig(dataset='me/moved', dataset_revision={first!r}))\n"
        "result = [splits.revision, len(splits.train)]"
    )
    assert answer["result"] == [first, 48], answer["err"]
    assert "v9" in error_of(client, tmp_path, "--dataset", "me/moved", "--dataset-revision", "v9")


def test_a_dataset_without_readable_images_is_an_error(
    running: tuple[LoopbackHub, Client], parquet: bytes, tmp_path: Path
) -> None:
    hub, client = running
    dataset(hub, "me/text", {"data.csv": b"text,label\nhello,0\nbye,1\n"})
    said = error_of(client, tmp_path, "--dataset", "me/text")
    assert "me/text has no image column (of type Image or binary); its columns: text (" in said
    dataset(hub, "me/empty", {"README.md": b"nothing here"})
    assert "me/empty" in error_of(client, tmp_path, "--dataset", "me/empty")
    dataset(hub, "me/broken", {"data/train-0.parquet": b"no parquet"})
    assert "me/broken" in error_of(client, tmp_path, "--dataset", "me/broken")
    damaged = (
        parquet[:4] + b"\xff" * 40 + parquet[44:]
    )  # overwrites the header of the first page; the footer stays intact
    dataset(hub, "me/damaged", {"data/train-0.parquet": damaged})
    assert "me/damaged on the Hub cannot be read" in error_of(client, tmp_path, "--dataset", "me/damaged")


def test_an_unreachable_hub_is_reported(running: tuple[LoopbackHub, Client], parquet: bytes, tmp_path: Path) -> None:
    hub, client = running
    dataset(hub, "me/away", {"data/train-0.parquet": parquet})
    hub.faults.append(Fault("me/away", "507", 1000))
    error = error_of(client, tmp_path, "--dataset", "me/away", code=1)
    assert "me/away is not a local folder, and the Hub could not be reached" in error
    hub.faults.clear()


def shard(tmp_path: Path, labels: list[int], names: list[str]) -> bytes:
    """Return a parquet file of digits with these labels and class names."""
    table = load_digits_table().select(range(len(labels))).remove_columns("label")
    table = table.add_column("label", labels).cast_column("label", datasets.ClassLabel(names=names))
    table.to_parquet(tmp_path / "part.parquet")
    return (tmp_path / "part.parquet").read_bytes()


def test_files_with_different_class_orders_are_matched_by_name_and_not_streamed(
    running: tuple[LoopbackHub, Client], tmp_path: Path
) -> None:
    hub, client = running
    files = {
        "data/train-00000-of-00002.parquet": shard(tmp_path, [0, 0, 1], ["dark", "light"]),
        "data/train-00001-of-00002.parquet": shard(tmp_path, [0, 1, 1], ["light", "dark"]),
        "data/test-00000-of-00001.parquet": shard(tmp_path, [0, 1], ["light", "dark"]),
    }
    dataset(hub, "me/mixed", files)
    answer = client.run(
        "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
        "splits = load_splits(DataConfig(dataset='me/mixed'))\n"
        "result = [splits.label_names, splits.train.labels.tolist(), splits.eval.labels.tolist()]"
    )
    assert answer["result"] == [["dark", "light"], [0, 0, 1, 1, 0, 0], [1, 0]], answer["err"]
    said = error_of(client, tmp_path, "--dataset", "me/mixed", "--streaming")
    assert "the classes of column label in data/train-00001-of-00002.parquet" in said


def test_a_dataset_of_the_hub_cannot_read_local_files(running: tuple[LoopbackHub, Client], tmp_path: Path) -> None:
    hub, client = running
    (tmp_path / "private.png").write_bytes(load_digits_table()[0]["image"]["bytes"])
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    paths = [
        str(tmp_path / "private.png"),
        f"file://{tmp_path}/private.png",
        "http://127.0.0.1/private.png",
        "/dev/zero",
    ]
    rows = [{"bytes": None, "path": path} for path in paths]
    table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features=features).data.table
    parquet_file.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "all.parquet")
    content = (tmp_path / "all.parquet").read_bytes()
    dataset(hub, "you/hostile", {"data/train-0.parquet": content, "data/test-0.parquet": content})
    answer = client.run(
        "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
        "from resnext_hub.data.decode import UnreadableImageError\n"
        "result = []\n"
        "for streaming in (False, True):\n"
        "    images = load_splits(DataConfig(dataset='you/hostile', streaming=streaming)).train\n"
        "    for item in (images.records() if streaming else range(4)):\n"
        "        try:\n"
        "            result.append(str(images.row(item)))\n"
        "        except UnreadableImageError as error:\n"
        "            result.append(str(error))\n"
    )
    assert answer["result"] == ["its path leads outside the dataset's folder"] * 8, answer["err"]


def test_class_folders_on_the_hub_are_loaded_and_streamed(running: tuple[LoopbackHub, Client]) -> None:
    hub, client = running
    images = {
        f"{split}/{name}/{i}.png": load_digits_table()[10 * number + i]["image"]["bytes"]
        for split in ("train", "test")
        for number, name in enumerate(("cat", "dog"))
        for i in range(3)
    }
    dataset(hub, "me/folders", images)
    answer = client.run(
        "from resnext_hub.data.config import *\nfrom resnext_hub.data.splits import *\n"
        "result = []\n"
        "for streaming in (False, True):\n"
        "    images = load_splits(DataConfig(dataset='me/folders', streaming=streaming)).train\n"
        "    items = images.records() if streaming else range(len(images))\n"
        "    result.append([images.image(item).size for item in items])\n"
    )
    assert answer["result"] == [[[8, 8]] * 6] * 2, answer["err"]
