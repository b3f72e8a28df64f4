"""Several labels per image: lists and columns of 0 and 1 are found without a flag, or refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pytest import LogCaptureFixture, mark, raises
from support.layouts import image, put

from resnext_hub.data.config import DataConfig
from resnext_hub.data.holdout import strata_of
from resnext_hub.data.sources.flags import join_columns, split_columns
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError

SETS: tuple[tuple[str, ...], ...] = (("sun",), ("sea", "sun"), (), ("sea",), ("sand", "sea"), ("sea", "sun")) * 4
"""Labels of 24 images."""

NAMES = ("sand", "sea", "sun")

MATRIX = np.array([[name in own for name in NAMES] for own in SETS])


def load(path: Path, **config: Any) -> Splits:
    return load_splits(DataConfig(dataset=str(path), **config))


def refused(path: Path, **config: Any) -> str:
    with raises(RequestError) as caught:
        load(path, **config)
    return str(caught.value)


def photos(root: Path) -> list[str]:
    files = [f"{number:02}.jpg" for number in range(len(SETS))]
    for number, file in enumerate(files):
        put(root / "images" / file, image(number))
    return files


def columns_table(root: Path, name: str = "labels.csv", yes: str = "1", no: str = "0", extra: str = "") -> Path:
    """A table with a column of 0 and 1 per label; `extra` is the name of another column, with a number of its own."""
    comma = "\t" if name.endswith(".tsv") else ","
    lines = [comma.join(["file", *([extra] if extra else []), *NAMES])]
    for number, (file, own) in enumerate(zip(photos(root), SETS, strict=True)):
        more = [str(700 + number)] if extra else []
        lines.append(comma.join([f"images/{file}", *more, *(yes if label in own else no for label in NAMES)]))
    put(root / name, "\n".join(lines) + "\n")
    return root


def jsonl(root: Path, name: str, file: str, labels: str) -> Path:
    rows = [{file: f"images/{path}", labels: list(own)} for path, own in zip(photos(root), SETS, strict=True)]
    put(root / name, "".join(json.dumps(row) + "\n" for row in rows))
    return root


def json_columns(root: Path) -> Path:
    rows = [
        {"file_name": f"images/{path}"} | {name: name in own for name in NAMES}
        for path, own in zip(photos(root), SETS, strict=True)
    ]
    put(root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


def parquet(root: Path, kind: Any, labels: list[Any], column: str = "tags") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), column: kind})
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(len(SETS))], column: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train.parquet")
    return root


def parquet_columns(root: Path, dtype: str, **more: tuple[Any, list[Any]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    features = {name: datasets.Value(dtype) for name in NAMES} | {name: feature for name, (feature, _) in more.items()}
    columns = {name: MATRIX[:, i].tolist() for i, name in enumerate(NAMES)} | {n: v for n, (_, v) in more.items()}
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(len(SETS))], **columns}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), **features}))
    table.to_parquet(root / "train.parquet")
    return root


def parquet_table(root: Path) -> Path:
    files = photos(root)
    columns = {name: MATRIX[:, i].astype(np.int8).tolist() for i, name in enumerate(NAMES)}
    datasets.Dataset.from_dict({"file_name": [f"images/{f}" for f in files], **columns}).to_parquet(
        root / "metadata.parquet"
    )
    return root


LISTS = [list(own) for own in SETS]
NUMBERS = [[NAMES.index(name) for name in own] for own in SETS]

LAYOUTS = {
    "CSV with columns of 0 and 1": columns_table,
    "CSV with columns of 0.0 and 1.0": lambda root: columns_table(root, yes="1.0", no="0.0"),
    "TSV with columns of True and False": lambda root: columns_table(root, "labels.tsv", "True", "False"),
    "CSV with a number for each row": lambda root: columns_table(root, extra="number"),
    "CSV as the dataset": lambda root: columns_table(root, "all.csv") / "all.csv",
    "metadata.jsonl with lists": lambda root: jsonl(root, "metadata.jsonl", "file_name", "labels"),
    "metadata.jsonl with lists in a column of any name": lambda root: jsonl(
        root, "metadata.jsonl", "file_name", "tags"
    ),
    "metadata.jsonl with truth values": json_columns,
    "JSONL with lists": lambda root: jsonl(root, "labels.jsonl", "path", "label"),
    "metadata.parquet with columns of 0 and 1": parquet_table,
    "parquet with lists of names": lambda root: parquet(root, datasets.List(datasets.Value("string")), LISTS),
    "parquet with large lists": lambda root: parquet(root, datasets.LargeList(datasets.Value("string")), LISTS),
    "parquet with lists of classes": lambda root: parquet(
        root, datasets.List(datasets.ClassLabel(names=list(NAMES))), NUMBERS
    ),
    "parquet with truth values": lambda root: parquet_columns(root, "bool"),
    "parquet with numbers 0 and 1": lambda root: parquet_columns(root, "int8"),
    "parquet with floats 0 and 1": lambda root: parquet_columns(root, "float32"),
    "parquet with truth values and a key": lambda root: parquet_columns(
        root, "bool", key=(datasets.Value("string"), [f"k{i}" for i in range(len(SETS))])
    ),
}


@mark.parametrize("name", LAYOUTS)
def test_a_layout_of_several_labels_is_read_with_the_right_labels(name: str, tmp_path: Path) -> None:
    found = load(LAYOUTS[name](tmp_path / "data"), eval_fraction=0.25, group_duplicates=False)
    assert found.is_multi_label
    assert found.label_names == NAMES
    assert isinstance(found.found.label_column, str)
    rows = np.concatenate([found.train.indices, found.eval.indices])
    labels = np.concatenate([found.train.labels, found.eval.labels])
    assert sorted(rows.tolist()) == list(range(len(SETS)))
    assert np.array_equal(labels, MATRIX[rows])
    again = load_splits(found.found)  # the resolved settings name the same columns
    assert again.fingerprint == found.fingerprint


def test_numbers_in_lists_are_labels_called_after_them(tmp_path: Path) -> None:
    found = load(parquet(tmp_path, datasets.List(datasets.Value("int64")), NUMBERS))
    assert found.label_names == ("0", "1", "2")
    assert found.is_multi_label


def test_classes_in_lists_are_matched_by_name_across_files(tmp_path: Path) -> None:
    for split, order in (("train", NAMES), ("validation", NAMES[::-1])):
        kind = datasets.List(datasets.ClassLabel(names=list(order)))
        rows = {
            "image": [{"bytes": image(i), "path": None} for i in range(len(SETS))],
            "tags": [[order.index(name) for name in own] for own in SETS],
        }
        features = datasets.Features({"image": datasets.Image(), "tags": kind})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    found = load(tmp_path)
    assert found.label_names == NAMES
    assert np.array_equal(found.train.labels, MATRIX)
    assert np.array_equal(found.eval.labels, MATRIX)


@mark.parametrize("kind", ["columns", "lists"])
def test_exactly_one_label_of_every_image_makes_classes(kind: str, tmp_path: Path, caplog: LogCaptureFixture) -> None:
    lines, rows = ["file,cat,dog,bird"], []
    for number in range(24):
        put(tmp_path / "images" / f"{number}.jpg", image(number))
        lines.append(f"{number}.jpg," + ",".join(str(int(number % 3 == i)) for i in range(3)))
        rows.append(json.dumps({"file_name": f"images/{number}.jpg", "label": [("bird", "cat", "dog")[number % 3]]}))
    put(
        tmp_path / ("labels.csv" if kind == "columns" else "metadata.jsonl"),
        "\n".join(lines if kind == "columns" else rows),
    )
    with caplog.at_level("INFO"):
        found = load(tmp_path)
    assert not found.is_multi_label
    assert set(found.label_names) == {"bird", "cat", "dog"}
    assert np.bincount(found.train.labels).tolist() != [0, 0, 0]
    assert "every image has exactly one label, so labels are treated as mutually exclusive classes" in caplog.text


def test_a_label_without_images_keeps_its_column(tmp_path: Path) -> None:
    root = columns_table(tmp_path)
    text = (root / "labels.csv").read_text().splitlines()
    put(root / "labels.csv", "\n".join([f"{text[0]},snow", *(f"{line},0" for line in text[1:])]))
    assert load(root).label_names == (*NAMES, "snow")


def test_hundreds_of_columns_are_kept(tmp_path: Path) -> None:
    names = [f"n{i:03}" for i in range(300)]
    lines = [",".join(["file", *names])]
    for number, file in enumerate(photos(tmp_path)):
        lines.append(",".join([file, *(str(int((number + i) % 5 < 2)) for i in range(300))]))
    put(tmp_path / "labels.csv", "\n".join(lines))
    assert load(tmp_path).label_names == tuple(names)


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    root = columns_table(tmp_path, extra="group")
    lines = (root / "labels.csv").read_text().splitlines()
    put(
        root / "labels.csv",
        "\n".join(re.sub(r",7(\d\d),", lambda found: f",{int(found[1]) % 2}x,", line) for line in lines),
    )
    assert "several columns" in refused(root) or "choose one" in refused(root)
    found = load(root, label_column="sun, sea")
    assert found.label_names == ("sun", "sea")
    assert "column group" in refused(root, label_column="group,sun")
    assert "several label columns must contain only 0 and 1" in refused(root, label_column="group,sun")
    assert "no such column" in refused(root, label_column="sun,moon")
    table = parquet_columns(tmp_path / "parquet", "bool", kind=(datasets.Value("string"), ["a", "b"] * 12))
    assert "several columns that could be labels" in refused(table)
    assert load(table, label_column="sea,sand").label_names == ("sea", "sand")
    assert "column kind of the training split contains a" in refused(table, label_column="kind,sea")


def test_a_column_of_labels_is_preferred_to_truth_values(tmp_path: Path) -> None:
    root = columns_table(tmp_path / "csv")
    lines = (root / "labels.csv").read_text().splitlines()
    put(root / "labels.csv", "\n".join(f"{line},{'label' if not i else 'ab'[i % 2]}" for i, line in enumerate(lines)))
    assert load(root).label_names == ("a", "b")
    kind = datasets.ClassLabel(names=["a", "b"])
    assert load(parquet_columns(tmp_path / "p", "bool", kind=(kind, [0, 1] * 12))).label_names == ("a", "b")


def test_a_column_of_classes_or_splits_among_truth_values_is_ambiguous(tmp_path: Path) -> None:
    numbers = (datasets.Value("int8"), [0, 1] * 12)
    for name in ("label", "is_valid"):
        assert "choose one with label_column" in refused(parquet_columns(tmp_path / name, "bool", **{name: numbers}))
    root = columns_table(tmp_path / "csv")
    lines = (root / "labels.csv").read_text().splitlines()
    put(root / "labels.csv", "\n".join(f"{line},{i % 2 if i else 'is_valid'}" for i, line in enumerate(lines)))
    assert "has a column is_valid, which is not supported" in refused(root)


def test_a_column_of_classes_is_preferred_to_lists_and_lists_to_keys(tmp_path: Path) -> None:
    lists = datasets.List(datasets.Value("string"))
    classes = (datasets.Value("string"), ["a", "b"] * 12)
    keys = (datasets.Value("int64"), [*range(24)])
    for name, (kind, values), names in (("classes", classes, ("a", "b")), ("keys", keys, NAMES)):
        root = tmp_path / name
        root.mkdir()
        features = datasets.Features({"image": datasets.Image(), "other": kind, "tags": lists})
        rows = {"image": [{"bytes": image(i), "path": None} for i in range(24)], "other": values, "tags": LISTS}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train.parquet")
        assert load(root).label_names == names
        table = tmp_path / f"{name}-table"
        files = [f"images/{file}" for file in photos(table)]
        columns = {"file_name": files, "other": values, "tags": LISTS}
        datasets.Dataset.from_dict(columns).to_parquet(table / "metadata.parquet")
        assert load(table).label_names == names
        lines = (json.dumps({key: column[i] for key, column in columns.items()}) for i in range(24))
        put(table / "metadata.jsonl", "".join(f"{line}\n" for line in lines))
        (table / "metadata.parquet").unlink()
        assert load(table).label_names == names


def test_empty_labels_in_lists_are_refused(tmp_path: Path) -> None:
    kind = datasets.List(datasets.Value("string"))
    for name, labels, count in (("null", [None, *LISTS[1:]], 1), ("inside", [["sun", None], [""], *LISTS[2:]], 2)):
        message = refused(parquet(tmp_path / name, kind, labels))
        assert f"has {count} empty labels out of 24" in message


def test_classes_in_the_lists_of_a_table_are_named_and_empty_ones_refused(tmp_path: Path) -> None:
    features = datasets.Features(
        {"file_name": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=list(NAMES)))}
    )
    for name, labels in (("whole", NUMBERS), ("broken", [[0, None], *NUMBERS[1:]])):
        root = tmp_path / name
        rows = {"file_name": [f"images/{file}" for file in photos(root)], "labels": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "metadata.parquet")
    assert load(tmp_path / "whole").label_names == NAMES
    assert "has 1 empty labels out of 24" in refused(tmp_path / "broken")


def test_one_label_alone_cannot_be_trained(tmp_path: Path) -> None:
    labels = [["sun"], []] * 12
    message = refused(parquet(tmp_path, datasets.List(datasets.Value("string")), labels))
    assert "has a single class to train on (sun)" in message


def test_a_class_out_of_range_in_a_list_is_refused_with_its_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet as files

    path = parquet(tmp_path, datasets.List(datasets.ClassLabel(names=list(NAMES))), NUMBERS) / "train.parquet"
    table = files.read_table(path)
    lists = table["tags"].to_pylist()
    lists[4] = [0, 7]
    column = pyarrow.array(lists, table.schema.field("tags").type)
    files.write_table(table.set_column(table.schema.get_field_index("tags"), table.schema.field("tags"), column), path)
    assert "label 7 at index 4 of the training split is out of range" in refused(tmp_path)


def test_lists_in_webdataset_shards_are_refused_by_name(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "train-000000.tar", "w") as archive:
        for number, own in enumerate(SETS):
            for suffix, content in (("jpg", image(number)), ("json", json.dumps({"label": own}).encode())):
                entry = tarfile.TarInfo(f"{number:02}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    assert "several labels per image are not supported in WebDataset shards" in refused(tmp_path)


def test_streams_of_several_labels_are_refused_by_name(tmp_path: Path) -> None:
    for name, root in (
        ("lists", parquet(tmp_path / "lists", datasets.List(datasets.Value("string")), LISTS)),
        ("columns", parquet_columns(tmp_path / "columns", "bool")),
    ):
        (root / "train.parquet").rename(root / "test.parquet")
        (root / "train.parquet").write_bytes((root / "test.parquet").read_bytes())
        column = "tags" if name == "lists" else "sand,sea,sun"
        assert "--streaming" not in refused(root, streaming=True, label_column=column)
        assert "supports only one label per image" in refused(root, streaming=True, label_column=column)


def test_rare_labels_are_divided_as_evenly_as_classes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = generator.random((400, 5)) < (0.6, 0.5, 0.3, 0.05, 0.03)
    root = tmp_path / "data"
    root.mkdir()
    lists = [[f"n{i}" for i in np.flatnonzero(row)] for row in labels]
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(datasets.Value("string"))})
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(len(lists))], "labels": lists}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train.parquet")
    for seed in range(4):
        found = load(root, eval_fraction=0.25, split_seed=seed, group_duplicates=False)
        held = found.eval.labels.sum(axis=0)
        assert np.abs(held - 0.25 * labels.sum(axis=0)).max() <= 12
        assert np.abs(held - 0.25 * labels.sum(axis=0))[3:].max() <= 2


def test_the_stratum_of_an_image_is_its_rarest_label() -> None:
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    assert strata_of(labels).tolist() == [1, 0, 3, 2]
    assert strata_of(np.array([2, 0, 1])).tolist() == [2, 0, 1]


@mark.parametrize("names", [("a", "b"), ("a b", "c,d", 'e"f'), ("ü", "1", "-x")])
def test_joined_names_of_columns_are_split_again(names: tuple[str, ...]) -> None:
    assert split_columns(join_columns(names), [*names, "other"]) == list(names)


def test_a_column_whose_name_has_a_comma_is_not_split() -> None:
    assert split_columns("a,b", ["a,b", "a", "b"]) == ["a,b"]
    assert split_columns("a,c", ["a", "b"]) == ["a,c"]
