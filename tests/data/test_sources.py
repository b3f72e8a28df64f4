"""Dataset layouts are recognized, or raise an error of one line that explains what to do."""

import io
import json
import os
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet
from pytest import LogCaptureFixture, MonkeyPatch, fixture, mark, raises
from support.processes import TINY

from resnext_hub.data.config import DataConfig
from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.data.holdout import similar_names, stratified_split
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.sources import Source, check_source, dataset_name, open_source, table_files
from resnext_hub.data.sources.names import class_names_of, likely_splits, split_keyword
from resnext_hub.data.sources.parquet import _small_columns, _version_of
from resnext_hub.data.sources.shards import splits_of
from resnext_hub.data.sources.walk import list_images, real_path, stored_path, walk
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, RunError


def png(shade: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = png()


def fill(root: Path, names: Iterable[str]) -> Path:
    """Write files: images if the suffix is that of one, else text; a name with a trailing slash is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(PNG if name.lower().endswith((".png", ".jpg")) else b"words")
    return root


def classes(prefix: str = "", names: Sequence[str] = ("cat", "dog"), count: int = 3) -> list[str]:
    return [f"{prefix}{name}/{i}.png" for name in names for i in range(count)]


def flat(*folders: str) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(3)]


def opened(root: object, **settings: object) -> Source:
    return open_source(DataConfig(dataset=str(root), **settings))


def load(root: object, **settings: object) -> Splits:
    # the images of these tests are copies of each other
    return load_splits(DataConfig(dataset=str(root), **{"group_duplicates": False, **settings}))


def refused(root: object, **settings: object) -> str:
    with raises(RequestError) as caught:
        load(root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def classes_of(source: Source) -> list[str]:
    return next(iter(source.tables.values())).features["label"].names


SPLITS = classes("train/") + classes("val/")


@mark.parametrize(
    ("files", "splits", "note"),
    [
        ([*SPLITS, "__MACOSX/train/cat/._0.png", "__MACOSX/x.png"], {"train", "val"}, "ignored: __MACOSX"),
        ([*SPLITS, "annotations/a.json"], {"train", "val"}, "ignored folders: annotations"),
        ([*SPLITS, *flat("test")], {"train", "val"}, "ignored folders: test"),
        ([*SPLITS, *flat("samples"), "README.md"], {"train", "val"}, "ignored folders: samples"),
        ([*classes("train/"), *flat("test")], {"train"}, "ignored folders: test"),
        ([*classes("train/"), *classes("test_set/")], {"train", "test_set"}, None),
        ([*classes("training_set/"), *classes("test_set/")], {"training_set", "test_set"}, None),
        ([*classes("Train/"), *classes("Valid/")], {"Train", "Valid"}, None),
        ([*classes("train2017/"), *classes("val2017/")], {"train2017", "val2017"}, None),
        ([*classes("TrainingImages/"), *classes("TestImages/")], {"TrainingImages", "TestImages"}, None),
        (
            [*classes("seg_train/seg_train/"), *classes("seg_test/seg_test/"), *flat("seg_pred/seg_pred")],
            {"seg_train", "seg_test"},
            "ignored folders: seg_pred",
        ),
        ([*classes("train/images/"), *classes("val/images/")], {"train", "val"}, None),
        (
            classes("animals/train/") + classes("animals/val/"),
            {"train", "val"},
            "using the only subfolder with images, animals/",
        ),
        (classes("my/images/"), {"train"}, "using the only subfolder with images, my/images/"),
        (
            classes("train/train/") + classes("train/test/"),
            {"train", "test"},
            "using the only subfolder with images, train/",
        ),
        ([*classes(), "cover.png"], {"train"}, "ignored 1 images outside class folders"),
        ([*classes(), "notes/a.txt", "empty/"], {"train"}, "ignored folders without images: empty, notes"),
        ([*classes(), "dog/1.heic", ".hidden", "a.txt"], {"train"}, "3 files skipped (.heic: 1, .txt: 1, hidden: 1)"),
        ([*classes(), "stray.parquet"], {"train"}, "ignored parquet files without images: stray.parquet"),
    ],
)
def test_splits_and_wrapper_folders_are_recognized_and_ignored_files_are_noted(
    tmp_path: Path, files: list[str], splits: set[str], note: str | None
) -> None:
    source = opened(fill(tmp_path, files))
    assert set(source.tables) == splits
    assert classes_of(source) == ["cat", "dog"]
    assert all(len(table) == 6 for table in source.tables.values())
    assert note is None or any(note in line for line in source.notes)


@mark.parametrize(
    ("files", "names"),
    [
        (flat("bus", "car", "train"), ["bus", "car", "train"]),
        (flat("bus", "test"), ["bus", "test"]),
        (flat("steam_train", "bullet_train", "bus"), ["bullet_train", "bus", "steam_train"]),
        ([*flat("bullet_train/day"), *flat("test_tube/glass")[:0], *flat("bus")], ["bullet_train", "bus"]),
        ([*flat("cat/persian", "cat/siamese"), *flat("dog")], ["cat", "dog"]),
        (flat('a "b" | c', "-x", "7", "ünï"), ["-x", "7", 'a "b" | c', "ünï"]),
    ],
)
def test_class_folders_may_have_any_name(tmp_path: Path, files: list[str], names: list[str]) -> None:
    source = opened(fill(tmp_path, files))
    assert set(source.tables) == {"train"}
    assert classes_of(source) == names


@mark.parametrize(
    ("files", "words"),
    [
        (
            flat("train", "test"),
            ["(test, train), but no class folders in test, train", "layout=classes", "metadata.csv"],
        ),
        (flat("Training", "Validation"), ["layout=classes"]),
        (flat("training_set", "test_set"), ["layout=classes"]),
        (flat("train", "val", "bus"), ["layout=classes"]),
        (flat("train", "test1"), ["test1, train", "layout=classes"]),
        (
            [*classes("cat/", ("train", "val")), *classes("dog/", ("train", "val"))],
            ["splits (train, val) inside each of cat, dog"],
        ),
        ([*classes("train/"), *flat("unlabelled")], ["(train), and other folders beside them", "layout=classes"]),
        ([*flat("train"), *classes("val/")], ["but no class folders in train"]),
        ([*flat("images"), "labels.csv"], ["its table labels.csv does not list its images; expected a CSV, TSV"]),
        ([*flat("images", "masks"), "train.csv"], ["its table train.csv does not list its images"]),
        (["0.png", "1.png", "classes.jsonl"], ["classes.jsonl cannot be read as jsonl"]),
        (["0.png", "1.png"], ["has images (.png: 2) but no class folders", "one folder per class"]),
        (flat("images"), ["a single class, images (.png: 3)", "one folder per class"]),
        (["a.zip", "b.zip"], ["archives (a.zip, b.zip); choose one, such as dataset=", "/a.zip, or unpack them"]),
        (["shard-0.tar"], ["only archives (shard-0.tar); choose one, such as dataset="]),
        (["a.txt"], ["has no images (found: .txt: 1; known suffixes: .avif"]),
        ([], ["has no images (found: nothing;"]),
        ([*classes(), "bird/1.HEIC", "bird/2.heic"], ["class folder bird", "(found .heic: 2)", "convert them"]),
        ([*classes(), "bird/p001", "bird/p002"], ["class folder bird", "(found no suffix: 2)"]),
        ([*classes("train/"), *classes("val/"), "val/bird/1.dng"], ["class folder val/bird", "(found .dng: 1)"]),
        ([*classes(), "config.yaml", "record.json"], ["is a run folder"]),
        (
            [*classes("set/train/"), *classes("set/val/"), *flat("demo")],
            ["splits (train, val) in set, and other folders beside it", "use dataset=", "/set, or"],
        ),
        (classes("test/"), ["no training split, only test; use train_split=test"]),
        (classes("data/Val/"), ["no training split, only Val"]),
        (
            [*classes("Train/"), *classes("train/"), *classes("val/")],
            ["several training splits (Train, train)", "train_split"],
        ),
        (
            [*classes("train_a/"), *classes("train_b/"), *classes("test/")],
            ["several training splits (train_a, train_b)", "train_split"],
        ),
        (
            [*classes("train/"), *classes("VAL/"), *classes("val/")],
            ["several evaluation splits (VAL, val)", "eval_split"],
        ),
    ],
)
def test_an_unknown_or_ambiguous_layout_raises_an_error_with_a_remedy(
    tmp_path: Path, files: list[str], words: list[str]
) -> None:
    message = refused(fill(tmp_path, files))
    assert all(word in message for word in words), message


def test_subfolders_that_all_classes_share_are_noted(tmp_path: Path) -> None:
    fill(tmp_path, classes("fold1/") + classes("fold2/"))
    assert any("each with the subfolders cat, dog" in note for note in opened(tmp_path).notes)
    assert load(tmp_path, layout="splits", train_split="fold1", eval_split="fold2").label_names == ("cat", "dog")


def test_the_layout_setting_decides_whether_folders_are_classes_or_splits(tmp_path: Path) -> None:
    fill(tmp_path, flat("train", "test"))
    assert classes_of(opened(tmp_path, layout="classes")) == ["test", "train"]
    assert "the split test has 3 images and no class folders" in refused(tmp_path, layout="splits")
    other = fill(tmp_path / "other", [*classes("first/"), *classes("second/")])
    splits = load(other, layout="splits", train_split="first", eval_split="second")
    assert (len(splits.train), len(splits.eval)) == (6, 6)
    assert "layout=classes is for folders of images" in refused("digits", layout="classes")


@mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", "cannot be unpacked: File is not a zip file"),
        ("a.tar.gz", "cannot be unpacked: it is not a tar file"),
        ("labels.json", "is a table in a format that is not supported; convert it to CSV, TSV, JSON lines or parquet"),
        ("labels.csv", "has no column of images, or of the names of images in"),
        ("cat.png", "is an image, not a dataset; expected one of these layouts"),
        ("notes.txt", "is not a parquet file; expected one of these layouts"),
    ],
)
def test_a_single_file_other_than_parquet_raises_an_error_with_its_kind(tmp_path: Path, name: str, words: str) -> None:
    assert words in refused(fill(tmp_path, [name]) / name)


# Tables of labels


@mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@mark.parametrize("at_top", [False, True])
def test_splits_without_class_folders_get_labels_from_metadata(tmp_path: Path, kind: str, at_top: bool) -> None:
    rows = {f"{split}/{i}.png": ("cat", "dog")[i % 2] for split in ("train", "test") for i in range(4)}
    fill(tmp_path, rows)
    for folder in ("",) if at_top else ("train", "test"):
        own = {name.removeprefix(f"{folder}/"): label for name, label in rows.items() if name.startswith(folder)}
        table = datasets.Dataset.from_dict({"file_name": list(own), "label": list(own.values())})
        write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind]
        write(tmp_path / folder / f"metadata.{kind}")
    splits = load(tmp_path)
    assert splits.label_names == ("cat", "dog")
    assert (splits.found.train_split, splits.found.eval_split) == ("train", "test")
    assert [splits.eval.row(i)["path"] for i in range(4)] == [str(tmp_path / "test" / f"{i}.png") for i in range(4)]
    assert splits.eval.labels.tolist() == [0, 1, 0, 1]


def write_csv(path: Path, *rows: str) -> None:
    path.write_text("".join(f"{row}\n" for row in rows))


def test_rows_without_files_and_files_without_rows_are_noted(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "b.png", "c.png", "d.png", "e.png"])
    write_csv(
        tmp_path / "metadata.csv",
        "file_name,label",
        "a.png,x",
        "b.png,y",
        "./c.png,x",
        "d.png,y",
        "../z.png,x",
        "/etc/hosts,x",
    )
    source = opened(tmp_path)
    assert "ignored 2 rows whose file does not exist, such as ../z.png" in source.notes
    assert "ignored 1 images without a row, such as e.png" in source.notes
    assert len(load(tmp_path).train) + len(load(tmp_path).eval) == 4


def test_a_split_column_defines_the_splits(tmp_path: Path) -> None:
    fill(tmp_path, [f"images/{i}.png" for i in range(6)])
    rows = [f"images/{i}.png,{'ab'[i % 2]},{'train' if i < 4 else 'val'}" for i in range(6)]
    write_csv(tmp_path / "metadata.csv", "file_name,label,split", *rows)
    assert {split: len(table) for split, table in opened(tmp_path).tables.items()} == {"train": 4, "val": 2}


@mark.parametrize(
    ("header", "rows", "words"),
    [
        ("file_name,label", ["0.png,x", "0.png,y"], "0.png has two labels in {root}/metadata.csv, x and y"),
        ("file_name,label", ["z.png,x"], "none of the files listed in {root}/metadata.csv exists, for example z.png"),
        ("file_name,label", ["0.png,x,more"], "row 2 has 3 columns, but the first row has 2"),
        (
            "file_name,label",
            ["0.png,0.5", "1.png,1.5"],
            "no label column (integers, strings or ClassLabel,",
        ),
        ("file_name,label", ["0.png,x", "1.png,", "2.png,y"], "1 empty labels out of 3"),
        (
            "file_name,width,height",
            ["0.png,1,2"],
            "has no column named label; its columns: file_name, width, height; choose one with",
        ),
    ],
)
def test_an_unusable_table_raises_an_error_with_its_name(
    tmp_path: Path, header: str, rows: list[str], words: str
) -> None:
    fill(tmp_path, ["0.png", "1.png", "2.png"])
    write_csv(tmp_path / "metadata.csv", header, *rows)
    message = refused(tmp_path)
    assert words.format(root=tmp_path) in message


def labelled(count: int = 6, prefix: str = "", more: Callable[[int], str] = lambda i: "") -> str:
    return "".join(f"{prefix}{i}.png,{'ab'[i % 2]}{more(i)}\n" for i in range(count))


@mark.parametrize(
    ("content", "words"),
    [
        (f"file_name,label,label\n{labelled(more=lambda i: ',c')}", "it has several columns called label"),
        (f"file_name,label\n{labelled()}".encode("utf-16-le"), "null characters; store it as UTF-8"),
        (f"file_name,label\n{labelled()}\xe9".encode("latin-1"), "it is not UTF-8: byte 0xe9"),
        ("file_name,label\n0.png,a\0\n1.png,b\n", "null characters"),
        ("file_name,label\n0.png,nan\n1.png,1.5\n", "no label column"),
        (f"file_name,label\n0.png,\u00a0\n{labelled()[8:]}", "1 empty labels out of 6"),
        (
            f"file_name,label,split\n{labelled(more=lambda i: ',test' if i > 2 else ',')}",
            "metadata.csv is empty for 3 of 6",
        ),
        (
            f"file_name,label,split\n{labelled(more=lambda i: ',test' if i > 2 else ', ')}",
            "metadata.csv is empty for 3 of 6",
        ),
        (f"file_name,label,split\n{labelled(more=lambda i: ',test')}", "no training split, only test"),
        (
            f"file_name,label,split\n{labelled(more=lambda i: ',' + ('Train', 'train', 'val')[i % 3])}",
            "differ only in case",
        ),
    ],
)
def test_an_ambiguous_or_damaged_table_raises_an_error(tmp_path: Path, content: str | bytes, words: str) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(tmp_path)


@mark.parametrize(
    ("name", "content"),
    [
        ("csv", f"\ufefffile_name,label\n{labelled()}".replace("\n", "\r\n").encode()),
        ("csv", f"file_name\tlabel\n{labelled()}".replace(",", "\t").encode("utf-16")),
        ("csv", f"file_name,label\n\n{labelled()} \n,\n".encode()),
        ("csv", ",file_name,kind\n" + "".join(f"{i},{i}.png,{'ab'[i % 2]}\n" for i in range(6))),
        ("csv", "file_name,label\n" + labelled(prefix="{root}/")),
        ("csv", "file_name,label\n" + labelled(prefix=".\\")),
        (
            "jsonl",
            "\ufeff" + "".join(json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2]}) + "\n" for i in range(6)),
        ),
    ],
)
def test_tables_written_by_other_programs_can_be_read(tmp_path: Path, name: str, content: str | bytes) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    text = content if isinstance(content, bytes) else content.replace("{root}", str(tmp_path)).encode()
    (tmp_path / f"metadata.{name}").write_bytes(text)
    source = opened(tmp_path)
    assert len(source.tables["train"]) == 6
    assert load(tmp_path).label_names == ("a", "b")


def test_file_names_match_in_either_unicode_normalization(tmp_path: Path) -> None:
    composed, apart = "\u00e9", "e\u0301"
    fill(tmp_path, [f"{composed}{i}.png" for i in range(4)] + [f"{apart}0.png"])
    write_csv(
        tmp_path / "metadata.csv",
        "file_name,label",
        f"{composed}0.png,a",
        f"{apart}0.png,b",
        *(f"{apart}{i}.png,{'ab'[i % 2]}" for i in (1, 2, 3)),
    )
    paths = dict(_paths_and_labels(opened(tmp_path)))
    assert paths[f"{apart}0.png"] == paths[f"{composed}1.png"] == paths[f"{composed}3.png"] == "b"
    assert paths[f"{composed}0.png"] == paths[f"{composed}2.png"] == "a"


def _paths_and_labels(source: Source) -> list[tuple[str, str]]:
    table = source.tables["train"]
    return [(os.path.basename(row["path"]), label) for row, label in zip(table["image"], table["label"], strict=True)]


def test_a_huge_table_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path, classes())
    with open(tmp_path / "metadata.jsonl", "wb") as file:
        file.truncate(1 << 40)
    assert "metadata.jsonl cannot be read as jsonl (more than 256 MB)" in refused(tmp_path)


@mark.parametrize("folders", [("training_set", "test_set"), ("x/seg_train", "x/seg_test"), ("train", "TestImages")])
def test_folders_with_a_split_in_their_name_are_splits_if_they_share_labels(
    tmp_path: Path, folders: tuple[str, str]
) -> None:
    fill(tmp_path, [f"{folder}/{i}.png" for folder in folders for i in range(6)])
    for folder in folders:
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,label\n{labelled()}")
    names = {folder.rpartition("/")[2] for folder in folders}
    assert {split: len(table) for split, table in opened(tmp_path).tables.items()} == dict.fromkeys(names, 6)
    (tmp_path / folders[0] / "metadata.csv").unlink()
    assert "the training split has no labels" in refused(tmp_path)


def test_folders_with_a_split_in_their_name_are_classes_if_they_share_no_label(tmp_path: Path) -> None:
    fill(tmp_path, flat("bullet_train", "test_tube"))
    rows = [f"{name}/{i}.png,{name}" for name in ("bullet_train", "test_tube") for i in range(3)]
    write_csv(tmp_path / "metadata.csv", "file_name,label", *rows)
    assert {split: len(table) for split, table in opened(tmp_path).tables.items()} == {"train": 6}


@mark.parametrize("names", [("label", "class"), ("class", "label")])
def test_tables_need_the_same_label_column(tmp_path: Path, names: tuple[str, str]) -> None:
    for split, name in zip(("train", "test"), names, strict=True):
        fill(tmp_path, [f"{split}/{i}.png" for i in range(6)])
        (tmp_path / split / "metadata.csv").write_text(f"file_name,{name}\n{labelled()}")
    assert "has its labels in column class, but another table has them in label" in refused(tmp_path)


@mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@mark.parametrize("fault", ["missing", "empty", "no label", "no file_name", "other files"])
def test_a_training_split_without_labels_raises_an_error(tmp_path: Path, kind: str, fault: str) -> None:
    fill(tmp_path, [f"{split}/{i}.png" for split in ("train", "test") for i in range(6)])
    table = datasets.Dataset.from_dict({"file_name": [f"{i}.png" for i in range(6)], "label": list("ababab")})
    faulty = {
        "empty": lambda: table.select([]),
        "no label": lambda: table.remove_columns("label"),
        "no file_name": lambda: table.remove_columns("file_name"),
        "other files": lambda: table.map(lambda row: {"file_name": f"z{row['file_name']}"}),
    }
    for split, content in (("test", table), ("train", faulty[fault]() if fault in faulty else None)):
        if content is not None:
            write = {"csv": content.to_csv, "jsonl": content.to_json, "parquet": content.to_parquet}[kind]
            write(tmp_path / split / f"metadata.{kind}")
    assert "the training split has no labels" in refused(tmp_path)


def test_a_split_without_labels_is_ignored_unless_it_is_the_training_split(tmp_path: Path) -> None:
    fill(tmp_path, [f"{split}/{i}.png" for split in ("train", "test") for i in range(6)])
    write_csv(tmp_path / "train" / "metadata.csv", "file_name,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(6)))
    write_csv(tmp_path / "test" / "metadata.csv", "file_name", *(f"{i}.png" for i in range(6)))
    source = opened(tmp_path)
    assert {split: len(table) for split, table in source.tables.items()} == {"train": 6}
    assert "ignored 6 images without a row, such as test/0.png" in source.notes
    (tmp_path / "train" / "metadata.csv").rename(tmp_path / "test" / "metadata.csv")
    assert "the training split has no labels" in refused(tmp_path)


def test_numbers_with_leading_zeros_are_text(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    write_csv(tmp_path / "metadata.csv", "file_name;label", *(f"{i}.png;{'00' + str(i % 2)}" for i in range(6)))
    assert load(tmp_path).label_names == ("000", "001")
    write_csv(tmp_path / "metadata.csv", "file_name,label", *(f"{i}.png,{(2, 10)[i % 2]}" for i in range(6)))
    assert load(tmp_path).label_names == ("2", "10")


def test_a_table_without_labels_does_not_affect_class_folders(tmp_path: Path) -> None:
    fill(tmp_path, classes())
    write_csv(tmp_path / "metadata.csv", "file_name,caption", "cat/0.png,a cat")
    assert classes_of(opened(tmp_path)) == ["cat", "dog"]


BATCHES = [f"images_00{batch}/{batch}{i}.png" for batch in (1, 2) for i in range(4)]


def rows_of(names: Iterable[str], separator: str = ",") -> list[str]:
    return [f"{name}{separator}{'ab'[i % 2]}" for i, name in enumerate(names)]


@mark.parametrize(
    ("name", "rows"),
    [
        ("Data_Entry.csv", ["Image,Label", *rows_of(path.rpartition("/")[2] for path in BATCHES)]),
        ("labels/all.csv", rows_of(path.rpartition("/")[2] for path in BATCHES)),
        ("HAM.csv", ["lesion_id,image_id,dx", *(f"x,{row}" for row in rows_of(path[11:13] for path in BATCHES))]),
        ("a.tsv", ["path\tlabel", *rows_of((path.replace("/", "\\") for path in BATCHES), "\t")]),
        ("a.jsonl", [json.dumps({"img": path[11:], "y": i % 2}) for i, path in enumerate(BATCHES)]),
        ("labels.json", [json.dumps({path[11:]: "ab"[i % 2] for i, path in enumerate(BATCHES)})]),
        ("metadata.csv", ["filename,label", *rows_of(BATCHES)]),
        ("metadata.csv", ["file_name,finding", *rows_of(BATCHES)]),
    ],
)
def test_a_table_that_lists_images_in_folders_requires_a_decision(tmp_path: Path, name: str, rows: list[str]) -> None:
    fill(tmp_path, [*BATCHES, name])
    write_csv(tmp_path / name, *rows)
    message = refused(tmp_path)
    assert name in message
    assert "if the folders images_001, images_002 are the classes, use layout=classes" in message
    assert ("label_column" in message) == ("file_name," in rows[0])
    assert classes_of(opened(tmp_path, layout="classes")) == ["images_001", "images_002"]


def test_tables_of_any_format_are_searched_for_image_names(tmp_path: Path) -> None:
    fill(tmp_path, BATCHES)
    table = datasets.Dataset.from_dict({"image": [path[11:] for path in BATCHES], "finding": list("abababab")})
    table.to_parquet(tmp_path / "table.parquet")
    assert "table.parquet lists images of the dataset" in refused(tmp_path)
    (tmp_path / "table.parquet").unlink()
    strings = "".join(f"<si><t>{text}</t></si>" for text in ("a", "b", *(path[11:] for path in BATCHES)))
    with zipfile.ZipFile(tmp_path / "table.xlsx", "w") as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst>{strings}</sst>")
    assert "table.xlsx lists images of the dataset" in refused(tmp_path)
    (tmp_path / "table.xlsx").write_bytes(b"PK\3\4 damaged")
    (tmp_path / "stray.parquet").write_bytes(b"PAR1 damaged")
    assert classes_of(opened(tmp_path)) == ["images_001", "images_002"]


@mark.parametrize(
    ("name", "rows", "note"),
    [
        ("notes.csv", ["date,remark", "2020,sharp", "2021,sharp", "2022,blurred", "2023,blurred"], None),
        ("notes.csv", ["image,remark", "cat/0.png,blurred"], None),
        ("loss.csv", ["epoch,loss", *(f"{i},{i % 2}" for i in range(8))], None),
        ("captions.csv", ["image,caption", *(f"{path},seen {i}" for i, path in enumerate(classes()))], None),
        ("metadata.csv", ["file_name,caption", *(f"{path},seen {i}" for i, path in enumerate(classes()))], None),
        ("list.csv", classes(), None),
        ("all.txt", classes(), None),
        (
            "birds.csv",
            ["class id,filepath,name", *(f"{path[0] == 'd':d},{path},{path[:3].upper()}" for path in classes())],
            "ignored birds.csv, which lists the images with the names of their class folders",
        ),
        ("coco.json", [json.dumps({"categories": ["cat", "dog"], "images": classes()})], "ignored coco.json"),
    ],
)
def test_tables_that_define_no_other_classes_are_ignored(
    tmp_path: Path, name: str, rows: list[str], note: str | None
) -> None:
    fill(tmp_path, classes())
    write_csv(tmp_path / name, *rows)
    source = opened(tmp_path)
    assert classes_of(source) == ["cat", "dog"]
    assert note is None or any(note in line for line in source.notes)


@mark.parametrize("name", ["train.txt", "meta/test.csv", "train_list.lst", "val.json"])
def test_a_list_of_images_named_like_a_split_raises_an_error(tmp_path: Path, name: str) -> None:
    fill(tmp_path, [*classes(), name])
    rows = "cat/1.png 0\ncat/2.png 0\n".replace(" ", "," if name.endswith("csv") else " ")
    (tmp_path / name).write_text(json.dumps(classes()[1:3]) if name.endswith("json") else rows)
    message = refused(tmp_path)
    assert f"{name} lists 2 of 6 images and looks like a split list, which is not supported" in message
    assert len(opened(tmp_path, layout="classes").tables["train"]) == 6


def test_a_table_of_splits_beside_class_folders_raises_an_error(tmp_path: Path) -> None:
    rows = [f"{path},{path[:3]},{('train', 'test')[path[4] == '2']}" for path in classes()]
    fill(tmp_path, classes())
    write_csv(tmp_path / "birds.csv", "filepath,name,data set", *rows)
    message = refused(tmp_path)
    assert "birds.csv lists images of the dataset, but is not used; if it defines the classes or splits" in message
    assert f"use dataset={tmp_path / 'birds.csv'}" in message
    assert (len(load(tmp_path / "birds.csv").train), len(load(tmp_path / "birds.csv").eval)) == (4, 2)
    (tmp_path / "birds.csv").unlink()
    (tmp_path / "parts.json").write_text(json.dumps({"train": classes()[:4], "test": classes()[4:]}))
    assert "parts.json lists images of the dataset, but is not used" in refused(tmp_path)
    assert "convert it to CSV, and use that file" in refused(tmp_path)


def test_only_the_beginning_of_a_huge_table_is_searched(tmp_path: Path) -> None:
    fill(tmp_path, BATCHES)
    with open(tmp_path / "all.csv", "w") as file:
        file.write("image,label\n" + "\n".join(rows_of(path[11:] for path in BATCHES)) + "\n")
        file.truncate(1 << 40)
    start = time.process_time()
    assert "all.csv lists images of the dataset, but is not used" in refused(tmp_path)
    assert time.process_time() - start < 5
    os.mkfifo(tmp_path / "more.csv")
    assert classes_of(opened(tmp_path, layout="classes")) == ["images_001", "images_002"]


@mark.parametrize("extra", [[], ["preview.png"]])
@mark.parametrize("place", ["", "cat/", "dog/"])
def test_a_column_of_unknown_meaning_beside_class_folders_requires_a_decision(
    tmp_path: Path, place: str, extra: list[str]
) -> None:
    fill(tmp_path, [*classes(count=4), *extra])
    names = [path for path in classes(count=4) if path.startswith(place)]
    rows = [f"{path.removeprefix(place)},{('ann', 'bob')[i % 2]}" for i, path in enumerate(names)]
    write_csv(tmp_path / place / "metadata.csv", "file_name,photographer", *rows)
    message = refused(tmp_path)
    assert "label_column" in message
    assert "layout=classes" in message
    assert classes_of(opened(tmp_path, layout="classes")) == ["cat", "dog"]
    assert load(tmp_path, label_column="photographer").label_names == ("ann", "bob")


@mark.parametrize("name", ["Split", "SPLIT", "set", "subset", "partition", "Usage", "stage"])
@mark.parametrize("values", [("train", "test"), ("Training", "Validation"), ("train_set", "test_set")])
def test_a_split_column_may_have_any_name(tmp_path: Path, name: str, values: tuple[str, str]) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "metadata.csv").write_text(
        f"file_name,label,{name},camera\n{labelled(more=lambda i: f',{values[i > 3]},left')}"
    )
    source = opened(tmp_path)
    assert {split: len(table) for split, table in source.tables.items()} == {values[0]: 4, values[1]: 2}
    assert f"splits from column {name}" in source.notes
    assert "unused columns: camera" in source.notes


def test_splits_are_found_across_all_tables(tmp_path: Path) -> None:
    fill(tmp_path, [f"{folder}/{i}.png" for folder in "xy" for i in range(4)])
    for folder, split in (("x", "train"), ("y", "test")):
        (tmp_path / folder / "metadata.csv").write_text(
            f"file_name,label,phase\n{labelled(4, more=lambda i, split=split: f',{split}')}"
        )
    assert {split: len(table) for split, table in opened(tmp_path).tables.items()} == {"train": 4, "test": 4}


@mark.parametrize(
    ("header", "more", "words"),
    [
        (
            "split",
            lambda i: f",{('TRAIN', 'te')[i > 3]}",
            "has the splits TRAIN, te, but none of them has a usual name for an evaluation split",
        ),
        ("split", lambda i: f",train\n{i}.png,{'ab'[i % 2]},test", "0.png has two splits in"),
        ("is_valid", lambda i: f",{i > 3}", "has a column is_valid, which is not supported"),
        ("Is_Test_set", lambda i: f",{int(i > 3)}", "has a column Is_Test_set, which is not supported"),
        (
            "set,split",
            lambda i: ",train,test" if i > 3 else ",test,train",
            "several split columns that differ (set, split)",
        ),
    ],
)
def test_ambiguous_splits_in_tables_raise_an_error(
    tmp_path: Path, header: str, more: Callable[[int], str], words: str
) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "metadata.csv").write_text(f"file_name,label,{header}\n{labelled(more=more)}")
    assert words in refused(tmp_path)


def test_an_evaluation_split_of_any_name_can_be_requested(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "metadata.csv").write_text(
        f"file_name,label,split\n{labelled(more=lambda i: ',te' if i > 3 else ',train')}"
    )
    assert len(load(tmp_path, eval_split="te").eval) == 2


@mark.parametrize(
    ("column", "words"),
    [
        (
            "split",
            "this column of {root}/metadata.csv contains splits; expected a column of classes (other columns: label)",
        ),
        ("file_name", "contains file names; expected a column of classes (other columns: label)"),
        ("nope", "{root}/metadata.csv has no such column; its columns: file_name, label, split"),
    ],
)
@mark.parametrize("folder", ["", "images/"])
def test_a_column_without_labels_raises_an_error_with_its_name(
    tmp_path: Path, column: str, words: str, folder: str
) -> None:
    fill(tmp_path, [f"{folder}{i}.png" for i in range(6)])
    (tmp_path / "metadata.csv").write_text(
        f"file_name,label,split\n{labelled(prefix=folder, more=lambda i: ',test' if i > 3 else ',train')}"
    )
    message = refused(tmp_path, label_column=column)
    assert f"label_column={column}: " in message
    assert words.format(root=tmp_path) in message


def test_two_label_columns_have_to_agree(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    path = tmp_path / "metadata.csv"
    path.write_text(f"file_name,class_name,label\n{labelled(more=lambda i: f',{i % 2}')}")
    assert load(tmp_path).label_names == ("0", "1")
    path.write_text(f"file_name,category,Label\n{labelled(more=lambda i: f',{i % 3}')}")
    assert "has the columns Label and category, which define different classes" in refused(tmp_path)
    assert load(tmp_path, label_column="category").label_names == ("a", "b")


@mark.parametrize(
    "content",
    [
        "file_name|label\n{}",
        "sep=;\nfile_name;label\n{}",
        "\n \nfile_name;label;a,b,c\n{};x",
        "File_Name, Label\n{}",
        "id,FILE_NAME,label\n0,{}",
        " file_name ,\tlabel \n {}\t",
        '"file_name", "label"\n"{}"',
        "file_name\tlabel\n{}",
    ],
)
def test_tables_may_have_any_delimiter_and_whitespace_around_cells(tmp_path: Path, content: str) -> None:
    fill(tmp_path, BATCHES)
    header, line = content.rsplit("\n", 1)
    delimiter = next(mark for mark in ";|\t," if mark in header and (mark != "\t" or "," not in header))
    between = f'"{delimiter} "' if '"' in line else f"{delimiter} "
    rows = [line.format(f"{path}{between}{'ab'[i % 2]}") for i, path in enumerate(BATCHES)]
    write_csv(tmp_path / ("metadata.tsv" if "\t" in header else "metadata.csv"), header, *rows)
    assert load(tmp_path).label_names == ("a", "b")


def test_whitespace_is_kept_in_quotes_and_in_json(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    rows = [f"{i}.png, {('x y', ' 5' + chr(34) + ' z ', chr(34) + ' a ' + chr(34))[i % 3]} " for i in range(6)]
    write_csv(tmp_path / "metadata.csv", "file_name,label", *rows)
    assert load(tmp_path).label_names == (" a ", '5" z', "x y")
    (tmp_path / "metadata.csv").unlink()
    write_csv(
        tmp_path / "metadata.jsonl", *(json.dumps({"file_name": f"{i}.png", "label": " a"[i % 2 :]}) for i in range(6))
    )
    assert load(tmp_path).label_names == (" a", "a")
    (tmp_path / "metadata.jsonl").unlink()
    write_csv(tmp_path / "metadata.csv", "file_name,label", *(f"{i}.png,{' ' * (i // 2)}{i % 2}" for i in range(6)))
    assert load(tmp_path).label_names == ("0", "1")


def test_only_the_needed_columns_are_read(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(6)]
    own = [json.dumps(row | {f"k{i}": 1}) for i, row in enumerate(rows * 2000)]
    write_csv(tmp_path / "metadata.jsonl", *own)
    start = time.process_time()
    assert load(tmp_path).label_names == ("a", "b")
    assert time.process_time() - start < 5  # keeping all columns of each row would take 15 s
    (tmp_path / "metadata.jsonl").unlink()
    table = datasets.Dataset.from_list(rows).data.table
    far = pyarrow.array([2**62] * 6, pyarrow.timestamp("us"))
    parquet.write_table(table.append_column("when", far), tmp_path / "metadata.parquet")
    assert load(tmp_path).label_names == ("a", "b")
    damaged = table.replace_schema_metadata({b"huggingface": b'{"info": {"features": 5}}'})
    parquet.write_table(damaged, tmp_path / "metadata.parquet")
    assert "metadata.parquet cannot be read as parquet (its schema is damaged" in refused(tmp_path)
    parquet.write_table(
        table.append_column("x", far).rename_columns(["file_name", "x", "label"]), tmp_path / "metadata.parquet"
    )
    assert "metadata.parquet cannot be read as parquet" in refused(tmp_path)


@mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_with_far_more_rows_than_images_raises_an_error(
    tmp_path: Path, kind: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "SPARE_ROWS", 100)
    fill(tmp_path, ["0.png", "1.png"])
    table = datasets.Dataset.from_dict({"file_name": ["0.png", "1.png"] * 100, "label": ["a", "b"] * 100})
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](tmp_path / f"metadata.{kind}")
    assert "(more than 120 rows; remove the rows whose images do not exist)" in refused(tmp_path)


# Links, special files, names


def test_each_real_folder_is_read_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", classes())
    for link, target in (
        ("cat/up", ".."),
        ("cat/self", "."),
        ("cat/all", "/"),
        ("cat/dogs", "../dog"),
        ("kitten", "cat"),
    ):
        (root / link).symlink_to(target)
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    outside = fill(tmp_path / "elsewhere", ["0.png", "1.png"])
    (root / "bird").symlink_to(outside)
    (root / "horse").symlink_to("nowhere")
    source = opened(root)
    assert classes_of(source) == ["bird", "cat", "dog"]
    assert len(source.tables["train"]) == 8
    assert any("cat/all" in note and "dangling link horse" in note for note in source.notes)


def test_the_root_of_the_file_system_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "all").symlink_to("/")
    assert "is the root of the file system" in refused(tmp_path / "all")
    assert "is the root of the file system" in refused("/")


def test_a_split_that_links_to_another_raises_an_error(tmp_path: Path) -> None:
    fill(tmp_path, classes("train/") + classes("test/"))
    (tmp_path / "val").symlink_to("train")
    assert f"val is a link to {tmp_path}/train, which is already part of the dataset" in refused(tmp_path)


@mark.parametrize(
    ("files", "links", "refused_link"),
    [
        (classes("raw/", ("cat_a", "dog_a")), {"train/cat": "../raw/cat_a", "train/dog": "../raw/dog_a"}, "train/cat"),
        (classes("batch1/") + classes("batch2/"), {"train": "batch1", "val": "batch2"}, "train"),
        (classes("train/"), {"val/cat": "../train/cat", "val/dog": "../train/dog"}, "val/cat"),
        (classes("all/"), {"test_set/cat": "../all/cat", "test_set/dog": "../all/dog"}, "test_set/cat"),
        (classes("train/") + classes("test/"), {"val": "."}, "val"),
        (classes("train/") + classes("val/"), {"train/cat/up": "..", "train/tom": "cat", "cats": "train/cat"}, None),
        (classes("v1/train/") + classes("v1/val/"), {"latest": "v1"}, None),
    ],
)
def test_links_that_would_leave_a_split_empty_raise_an_error(
    tmp_path: Path, files: list[str], links: dict[str, str], refused_link: str | None
) -> None:
    fill(tmp_path, files)
    for link, target in links.items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(target)
    if refused_link:
        message = refused(tmp_path)
        assert f"/{refused_link} is a link to {tmp_path}" in message
        assert "which is already part of the dataset" in message
        assert "layout=classes" in message
    else:
        assert classes_of(opened(tmp_path)) == ["cat", "dog"]


def test_ignored_splits_are_noted(tmp_path: Path) -> None:
    fill(tmp_path, [*SPLITS, *classes("train_extra/")])
    assert "ignored folders: train_extra (--layout splits uses every folder as a split" in " ".join(
        opened(tmp_path).notes
    )
    assert len(load(tmp_path, layout="splits", train_split="train_extra").train) == 6


def test_special_files_are_listed_but_never_opened(tmp_path: Path) -> None:
    fill(tmp_path, [*classes(), "cat/folder.jpg/9.png"])
    os.mkfifo(tmp_path / "cat" / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cat" / "socket.jpg"))
    for link, target in (("gone.jpg", "nowhere.jpg"), ("itself.jpg", "itself.jpg"), ("zero.jpg", "/dev/zero")):
        (tmp_path / "cat" / link).symlink_to(target)
    tree = walk(tmp_path)
    sizes = dict(zip(tree.images, tree.sizes, strict=True))
    assert (sizes["cat/gone.jpg"], sizes["cat/itself.jpg"]) == (-1, -1)
    assert {"cat/fifo.jpg", "cat/socket.jpg", "cat/zero.jpg", "cat/folder.jpg/9.png"} < set(sizes)
    assert load(tmp_path).label_names == ("cat", "dog")
    for name in ("train.parquet", "metadata.csv"):
        os.mkfifo(tmp_path / name)
        assert name in refused(tmp_path / name if name == "train.parquet" else tmp_path)


def test_junk_and_run_folders_are_ignored_at_every_depth(tmp_path: Path) -> None:
    junk = [
        ".ipynb_checkpoints/0-checkpoint.png",
        "@eaDir/0.png",
        "__MACOSX/._0.png",
        "._0.png",
        "Thumbs.db",
        ".DS_Store",
    ]
    fill(tmp_path, [*classes(), *(f"cat/{name}" for name in junk), *junk])
    for place in ("runs/a", "cat/old"):
        fill(tmp_path / place, ["config.yaml", "metrics.jsonl", "plots/curves.png", "model/plots/curves.png"])
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == classes()
    assert any("run folder cat/old, run folder runs/a" in note for note in opened(tmp_path).notes)


def test_names_that_are_not_utf8_get_printable_class_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "d", classes())
    odd = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(odd)
    for i in range(3):
        shutil.copy(root / "cat" / "0.png", odd + b"/\xff%d.png" % i)
    fill(root, flat("a\nb\t\x1b[31m"))
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/s\xe9t")
    os.rename(root, strange)
    splits = load(strange)
    assert splits.label_names == ("a\\nb\\t\\x1b[31m", "caf\\xe9", "cat", "dog")
    assert splits.dataset_id == "s\\xe9t"
    json.dumps([splits.dataset_id, *splits.label_names]).encode()
    for part in (splits.train, splits.eval):
        for i in range(len(part)):
            assert part.image(i).size == (8, 8)
            part.name(i).encode()
    os.mkdir(os.path.join(strange, "caf\\xe9"))
    shutil.copy(os.path.join(strange, "cat", "0.png"), os.path.join(strange, "caf\\xe9", "0.png"))
    assert "two classes whose names are both displayed as caf\\xe9" in refused(strange)


@mark.parametrize("name", ["plain", "ünï/ø", os.fsdecode(b"a\xff\xfe/b\xc3"), "tab\t\n"])
def test_stored_paths_are_valid_text_and_can_be_reversed(name: str) -> None:
    stored = stored_path(name)
    stored.encode()
    assert real_path(stored) == name


def test_two_unicode_normalizations_of_a_name_are_one_class(tmp_path: Path) -> None:
    fill(tmp_path, [*classes("train/", ("caf\u00e9", "tea")), *classes("val/", ("cafe\u0301", "tea"))])
    splits = load(tmp_path)
    assert splits.label_names == ("caf\u00e9", "tea")
    assert splits.eval.labels.tolist() == [0] * 3 + [1] * 3
    assert class_names_of(["n\u0303", "\u00f1"], "x") == {"n\u0303": "\u00f1", "\u00f1": "\u00f1"}


def test_an_unreadable_class_folder_raises_an_error_with_its_name() -> None:
    with tempfile.TemporaryDirectory() as scratch:  # tmp_path is not accessible to another user
        folder = Path(scratch)
        folder.chmod(0o755)
        fill(folder, classes())
        (folder / "cat").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root can read everything
        try:
            message = refused(folder)
        finally:
            os.seteuid(os.getuid())
            (folder / "cat").chmod(0o755)
    assert "the folder cat in" in message
    assert "permission denied" in message


def test_suspicious_classes_are_logged(tmp_path: Path, caplog: LogCaptureFixture, monkeypatch: MonkeyPatch) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("resnext_hub"), "propagate", True)
    fill(tmp_path, [*classes("train/"), *classes("val/", ("Cat", "dog", "horse")), *classes("dev/")])
    with caplog.at_level(logging.INFO, "resnext_hub"):
        load(tmp_path)
    assert "no training images for Cat, horse" in caplog.text
    assert "classes Cat, cat differ only in case or spaces" in caplog.text
    assert "unused splits: dev" in caplog.text
    assert similar_names(["a", "A ", "b"]) == [["a", "A "]]


# Held-out images


@mark.parametrize(
    ("counts", "fraction", "held"),
    [
        ([3] * 50, 0.2, [1] * 50),
        ([2, 40], 0.2, [1, 9]),
        ([1, 2, 10], 0.2, [0, 1, 2]),
        ([2, 2, 2], 0.9, [1, 1, 1]),
        ([1000, 5], 0.0001, [1, 1]),
    ],
)
def test_classes_with_two_images_are_in_both_splits(counts: list[int], fraction: float, held: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    kept, out = stratified_split(labels, fraction, seed=3)
    assert np.bincount(labels[out], minlength=len(counts)).tolist() == held
    assert sorted([*kept, *out]) == list(range(len(labels)))
    assert np.array_equal(out, stratified_split(labels, fraction, seed=3)[1])


def test_classes_with_a_single_image_each_raise_an_error() -> None:
    with raises(
        RequestError, match=r"no images can be held out: each of the 5000 classes has only one image; add images"
    ):
        stratified_split(np.arange(5000), 0.2, 0)


@mark.parametrize(
    "settings",
    [
        {"split_seed": -1}, {"split_seed": 5_000_000_000},
        {"eval_fraction": 0.99}, {"eval_fraction": 0.0}, {"eval_fraction": float("nan")}, {"max_bad_fraction": 2.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_raise_an_error_with_the_range(settings: dict[str, float]) -> None:
    (name,) = settings
    with raises(RequestError, match=f"^{name}=.*: expected a .*number .* 0 (to|and)"):
        DataConfig(**settings)


# Parquet and saved datasets


def write(path: Path, labels: Sequence[object], kind: object, rows: Sequence[dict[str, object]] | None = None) -> Path:
    """Write a parquet file without the corrections that datasets would make."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
    rows = rows or [{"bytes": PNG, "path": "image.png"}] * len(labels)
    table = pyarrow.table({"image": list(rows), "label": list(labels)}, schema=features.arrow_schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


def named(*names: str) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=list(names))


@mark.parametrize(
    ("files", "splits"),
    [
        (["train/part-0", "val/part-0"], {"train": ["train/part-0"], "val": ["val/part-0"]}),
        (["cats-train-0", "cats-val-0"], {"train": ["cats-train-0"], "val": ["cats-val-0"]}),
        (
            ["data/test-00000-of-00001", "data/train-0"],
            {"test": ["data/test-00000-of-00001"], "train": ["data/train-0"]},
        ),
        (["x/validation/a", "x/training/b"], {"validation": ["x/validation/a"], "training": ["x/training/b"]}),
        (["contest", "strain"], {"train": ["contest", "strain"]}),
        (["0000", "0001"], {"train": ["0000", "0001"]}),
    ],
)
def test_splits_of_parquet_files_follow_from_the_names_of_files_and_folders(
    files: list[str], splits: dict[str, list[str]]
) -> None:
    found = splits_of(Path("data"), (f"{file}.parquet" for file in files))
    assert found == {split: [f"{file}.parquet" for file in members] for split, members in splits.items()}


def test_a_parquet_file_without_a_split_beside_others_raises_an_error() -> None:
    with raises(
        RequestError, match=r"extra\.parquet has no split in its name, unlike other files \(test, train\); rename it"
    ):
        splits_of(Path("data"), ["train.parquet", "test.parquet", "extra.parquet"])


@mark.parametrize(
    ("files", "words"),
    [
        (
            ["full/train-0", "full/test-0", "small/train-0", "small/test-0"],
            "train split in several places (full, small)",
        ),
        (["fold0/train", "fold0/test", "fold1/train", "fold1/test"], "train split in several places (fold0, fold1)"),
        (["train", "test", "backup/train"], "train split in several places (the folder itself, backup)"),
        (["a/train/0", "b/train/0", "test"], "train split in several places (a, b)"),
        (["cats/0", "dogs/0"], "in the folders cats, dogs, whose names are not used as labels"),
        (["train/cats/0", "train/dogs/0", "test/x/0"], "in the folders cats, dogs"),
        (["0", "old/0"], "in the folders ., old"),
    ],
)
def test_parquet_files_that_could_be_several_datasets_are_not_merged(files: list[str], words: str) -> None:
    with raises(RequestError) as caught:
        splits_of(Path("data"), (f"{file}.parquet" for file in files))
    assert words in str(caught.value)
    assert "move all files into one folder" in str(caught.value)


@mark.parametrize(
    ("files", "series"),
    [
        (["full-train-0", "small-train-0", "small-test-0"], "full train, small train"),
        (["fold0-train", "fold1-train", "fold_1-test"], "fold0 train, fold1 train"),
        (["train", "train_augmented"], "train, train augmented"),
        (["train/0", "train_extra/0", "test/0"], "train, train extra"),
    ],
)
def test_parquet_files_of_different_series_in_a_split_are_not_merged(files: list[str], series: str) -> None:
    with raises(
        RequestError,
        match=rf"several series of parquet files of the train split \({series}\), .* the same base name",
    ):
        splits_of(Path("data"), (f"{file}.parquet" for file in files))


@mark.parametrize(
    "files",
    [
        ["data/train-0", "data/train-1", "data/test-0"],
        ["train", "train (1)", "test"],
        ["train-00000-of-00002", "train_00001", "train-part-3", "val-0"],
        ["fold0-train-00000-of-00002", "fold0-train-00001-of-00002"],
        ["cats-train-0", "cats-train-1", "dogs-val"],
        ["a/train", "b/test"],
        ["part0/x", "part1/x"],
        ["train/000/x", "train/001/x", "test/000/x"],
        ["2023-01/a", "2023-02/a"],
        ["label=cat/0", "label=test/0"],
        ["split=train/label=cat/0", "split=train/label=dog/0", "split=test/label=cat/0"],
    ],
)
def test_parquet_files_in_numbered_or_labelled_folders_are_one_dataset(files: list[str]) -> None:
    splits = splits_of(Path("data"), (f"{file}.parquet" for file in files))
    assert sorted(file for members in splits.values() for file in members) == sorted(
        f"{file}.parquet" for file in files
    )
    assert set(splits) <= {"train", "test", "val"}
    assert "train" in splits


def in_folders(root: Path, folders: Iterable[str], columns: dict[str, list[object]] | None = None) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"image": [PNG] * 4, **(columns or {})}), root / folder / "part-0.parquet")
    return root


@mark.parametrize(
    ("folders", "names"),
    [
        (["label=dog", "label=cat"], ("cat", "dog")),
        (["label=10", "label=2"], ("2", "10")),
        (["label=01", "label=1"], ("01", "1")),
        (["label=a%20b", "label=train"], ("a b", "train")),
        (["version=1/label=x", "version=1/label=y"], ("x", "y")),
    ],
)
def test_labels_in_folder_names_are_a_column(tmp_path: Path, folders: list[str], names: tuple[str, ...]) -> None:
    splits = load(in_folders(tmp_path, folders))
    assert splits.label_names == names
    assert np.bincount(splits.train.labels).tolist() == [3, 3]
    assert splits.train.image(0).size == (8, 8)


def test_labels_in_folder_names_match_rows_and_splits(tmp_path: Path) -> None:
    in_folders(tmp_path, [f"split={split}/label={name}" for split in ("train", "test") for name in ("a", "b")])
    splits = load(tmp_path)
    assert (splits.train.labels.tolist(), splits.eval.labels.tolist()) == ([0] * 4 + [1] * 4,) * 2
    assert "no label column" in refused(tmp_path, streaming=True)


@mark.parametrize(
    ("folders", "columns", "words"),
    [
        (
            ["label=a", "label=b"],
            {"source": ["web", "cam"] * 2},
            "several columns that could be labels (source, label); choose one with",
        ),
        (["label=a", "label=b", "."], {}, "part-0.parquet is not in a label=… folder, unlike the other files"),
        (["label=a", "label=__HIVE_DEFAULT_PARTITION__"], {}, "4 empty labels out of 8"),
        (["label=a"], {}, "no label column"),
    ],
)
def test_folders_that_do_not_label_all_rows_raise_an_error(
    tmp_path: Path, folders: list[str], columns: dict[str, list[object]], words: str
) -> None:
    (tmp_path / "set").mkdir()
    for folder in folders:
        (tmp_path / "set" / folder).mkdir(exist_ok=True)
        parquet.write_table(
            pyarrow.table({"image": [PNG] * 4, **columns}), tmp_path / "set" / folder / "part-0.parquet"
        )
    assert words in refused(tmp_path / "set")


def configured(root: Path, configs: str, *names: str) -> Path:
    """Write a repository with configurations in its README.md, and a class in each file that no other has."""
    for name in names:
        write(root / name, [0, 1] * 4, named("common", name))
    (root / "README.md").write_text(f"---\nlicense: mit\n{configs}\ntags: [a]\n---\n# Words\nconfigs: none\n")
    return root


SMALL_AND_FULL = """configs:
- config_name: full
  data_files:
  - split: train
    path: full/train-*
  - split: test
    path: [full/test-*]
- config_name: small
  data_dir: small"""
SMALL_AND_FULL_FILES = [f"{name}/{split}-0.parquet" for name in ("full", "small") for split in ("train", "test")]


def test_a_configuration_of_a_cloned_repository_can_be_chosen(tmp_path: Path) -> None:
    configured(tmp_path, SMALL_AND_FULL, *SMALL_AND_FULL_FILES)
    assert "has no default configuration; choose one of full, small with dataset_config" in refused(tmp_path)
    assert "lists no existing files for medium; choose one of full, small" in refused(tmp_path, dataset_config="medium")
    for name in ("full", "small"):
        splits = load(tmp_path, dataset_config=name)
        assert splits.label_names == ("common", f"{name}/train-0.parquet", f"{name}/test-0.parquet")
        assert splits.found.dataset_config == name
    assert "are only for datasets on the Hub" in refused(tmp_path / "full", dataset_config="full")


@mark.parametrize(
    ("configs", "train", "test"),
    [
        (
            "configs:\n- config_name: x\n  data_files:\n"
            "  - {split: train, path: data/a-*}\n  - {split: test, path: data/b-*}",
            "a",
            "b",
        ),
        ("configs:\n  - data_files:\n      train: ./data/b-0.parquet\n      test: ['**/a-*.parquet']", "b", "a"),
        (
            "configs:\n- config_name: x\n  data_files: data/*\n- config_name: y\n  default: true\n  data_dir: data\n"
            "  data_files: {train: 'b-?.parquet', test: 'a*'}",
            "b",
            "a",
        ),
        (
            "configs:\n- {config_name: x, data_files: q/*}\n"
            "- {config_name: default, data_files: {train: 'data/a*', test: '*/b*'}}",
            "a",
            "b",
        ),
        ("configs: [\n{config_name: x, data_files: {train: data/a*, test: data/b*}}\n]", "a", "b"),
    ],
)
def test_splits_follow_readme(tmp_path: Path, configs: str, train: str, test: str) -> None:
    configured(tmp_path, configs, "data/a-0.parquet", "data/b-0.parquet")
    splits = load(tmp_path)
    assert splits.label_names[1:] == (f"data/{train}-0.parquet", f"data/{test}-0.parquet")


def test_files_that_readme_does_not_list_are_noted(tmp_path: Path) -> None:
    configs = "configs:\n- config_name: x\n  data_files: data/a-*"
    source = opened(configured(tmp_path, configs, "data/a-0.parquet", "data/b-0.parquet"))
    assert "ignored files that configuration x does not list: data/b-0.parquet" in source.notes
    assert len(source.tables["train"]) == 8


@mark.parametrize(
    ("configs", "words"),
    [
        ("configs:\n- data_files: {train: 'data/*', test: data/b-*}", "lists data/b-0.parquet in several splits"),
        ("configs:\n- data_files: 5", "has invalid configs"),
        ("configs: 5", "has invalid configs"),
        ("configs:\n- a", "has invalid configs"),
        ("configs:\n- &x {a: *x}", "has invalid configs"),
        ("configs:\n- {data_files: [", "has invalid configs"),
        ("configs:\n- !!python/name:os.system x", "has invalid configs"),
        ("configs:\n" + "- {data_files: x}\n" * 10000, "has invalid configs (they have more than 65536"),
    ],
)
def test_invalid_configs_in_readme_raise_an_error(tmp_path: Path, configs: str, words: str) -> None:
    message = refused(configured(tmp_path, configs, "data/a-0.parquet", "data/b-0.parquet"))
    assert words in message
    assert "move it elsewhere" in message


@mark.parametrize(
    "readme",
    ["", "---", "# Words", "---\nlicense: mit\n---", "---\nconfigs:\n- data_files: gone/*\n---", "\ufeff---\r\n"],
)
def test_a_readme_without_existing_files_is_ignored(tmp_path: Path, readme: str) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 4, named("a", "b"))
    write(tmp_path / "test.parquet", [0, 1] * 4, named("a", "b"))
    (tmp_path / "README.md").write_text(readme)
    assert set(opened(tmp_path).tables) == {"train", "test"}


def test_splits_in_names_are_whole_words() -> None:
    words = {"cats-val-00000-of-1": "val", "TestImages": "test", "contest": None, "train-test": None, "test2": "test"}
    assert {name: split_keyword(name) for name in words} == words
    assert likely_splits(["seg_pred", "seg_test", "seg_train"], "eval") == ["seg_test"]
    assert likely_splits(["a", "b"], "train") == []


def test_labels_of_shards_and_splits_are_matched_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 0, 1], named("dark", "light"))
    write(tmp_path / "train-1.parquet", [0, 1, 1], named("light", "dark"))
    write(tmp_path / "test-0.parquet", [0, 1, 2], named("grey", "light", "dark", "unused"))
    splits = load(tmp_path)
    assert splits.label_names == ("dark", "light", "grey")
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 0, 0]
    assert splits.eval.labels.tolist() == [2, 1, 0]
    assert "the classes of column label in train-1.parquet" in refused(tmp_path, streaming=True)


@mark.parametrize(
    ("train", "test", "words"),
    [
        (
            ([0, 1] * 2, datasets.Value("int64")),
            (["0", "1"], datasets.Value("string")),
            "number in train.parquet, text in",
        ),
        (
            ([0, 1] * 2, named("a", "b")),
            ([0, 1], datasets.Value("int64")),
            "class label in train.parquet, number in",
        ),
        (
            ([0, 1] * 2, named("a", "b")),
            (["a", "b"], datasets.Value("string")),
            "class label in train.parquet, text in",
        ),
        (
            ([0, 1, 2**62], datasets.Value("int64")),
            None,
            "has the label 4611686018427387904, which does not look like a class (other labels: 0, 1)",
        ),
        (([0, 1, 2**32 - 1], datasets.Value("uint32")), None, "has the label 4294967295"),
        (
            ([0, 1, -1], datasets.Value("int64")),
            None,
            "has the label -1, which does not look like a class (other labels: 0, 1)",
        ),
        (
            ([0.0, 1.0], datasets.Value("float32")),
            None,
            "does not contain classes in train.parquet: it has type float32",
        ),
        (
            ([[[0]], [[1]]], datasets.List(datasets.List(datasets.Value("int64")))),
            None,
            "does not contain classes in train.parquet",
        ),
        ((["a", "b", None], datasets.Value("string")), None, "has 1 empty labels out of 3"),
        ((["a", "b", ""], datasets.Value("string")), None, "has 1 empty labels out of 3"),
        (
            ([0, 1, 0], named("a", "b")),
            ([0, 1], named("c", "d")),
            "no class of the evaluation split (c, d) is in the training",
        ),
        (([], named("a", "b")), None, "the train split has no rows"),
    ],
)
def test_labels_that_are_not_classes_or_differ_in_type_raise_an_error(
    tmp_path: Path, train: tuple[list[object], object], test: tuple[list[object], object] | None, words: str
) -> None:
    write(tmp_path / "train.parquet", *train)
    if test is not None:
        write(tmp_path / "test.parquet", *test)
    assert words in refused(tmp_path, label_column="label")


def test_numbers_and_class_labels_named_by_numbers_are_compatible(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 2, named("0", "1"))
    write(tmp_path / "test.parquet", [1, 0], datasets.Value("int64"))
    splits = load(tmp_path)
    assert splits.label_names == ("0", "1")
    assert splits.eval.labels.tolist() == [1, 0]


@mark.parametrize(
    ("described", "words"),
    [
        (b"{bad json", "its schema is damaged"),
        (b'{"info": {"features": 5}}', "its schema is damaged"),
        (b'{"info": {"features": {"label": {"names": ["a", "a"], "_type": "ClassLabel"}}}}', "is damaged"),
    ],
)
def test_a_damaged_description_of_columns_raises_an_error(tmp_path: Path, described: bytes, words: str) -> None:
    table = parquet.read_table(write(tmp_path / "train.parquet", [0, 1] * 2, named("a", "b")))
    parquet.write_table(table.replace_schema_metadata({b"huggingface": described}), tmp_path / "train.parquet")
    assert words in refused(tmp_path)


def test_files_with_different_columns_raise_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "b.parquet", [0, 1] * 2, named("a", "b"))
    parquet.write_table(parquet.read_table(path).rename_columns(["image", "kind"]), tmp_path / "a.parquet")
    assert "b.parquet has the columns image, label, but a.parquet has image, kind" in refused(tmp_path)


def test_damaged_parquet_files_raise_an_error_with_their_name(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", [0, 1] * 40, named("a", "b")).read_bytes()
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("text", b"not parquet at all")):
        path = tmp_path / name / "train.parquet"
        path.parent.mkdir()
        path.write_bytes(content)
        assert f"{name}/train.parquet cannot be read as parquet" in refused(path.parent)


def test_rows_can_only_refer_to_files_in_the_datasets_folder(tmp_path: Path) -> None:
    fill(tmp_path, ["outside.png", "data/in.png", "data/sub/deep.png"])
    (tmp_path / "data" / "link.png").symlink_to("../outside.png")
    inside = ["in.png", str(tmp_path / "data" / "sub" / "deep.png"), "sub/../in.png"]
    outside = [
        "../outside.png",
        str(tmp_path / "outside.png"),
        "link.png",
        "/dev/zero",
        "http://host/a.png",
        "file:///a",
        "x\0y",
    ]
    rows = [{"bytes": None, "path": path} for path in inside + outside]
    write(tmp_path / "data" / "all.parquet", ["x", "y"] * 5, datasets.Value("string"), rows)
    splits = load(tmp_path / "data")
    part = splits.train
    everything = IndexedImages(part.rows, part.image_column, np.arange(10), np.zeros(10, np.int64), part.roots)
    for index in range(10):
        if index < len(inside):
            assert everything.image(index).size == (8, 8)
        else:
            with raises(UnreadableImageError, match="leads outside the dataset's folder"):
                everything.row(index)
            assert everything.name(index).isprintable()


def test_rows_with_the_same_path_have_distinct_names(tmp_path: Path) -> None:
    write(tmp_path / "all.parquet", [0, 1] * 5, named("a", "b"))
    train = load(tmp_path).train
    assert len({train.name(i) for i in range(len(train))}) == len(train)
    assert train.name(0) == f"image.png (index {train.indices[0]})"


def test_empty_shards_are_ignored_and_missing_ones_noted(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00004.parquet", [0, 1] * 4, named("a", "b"))
    write(tmp_path / "train-00002-of-00004.parquet", [], named("a", "b"))
    assert opened(tmp_path).notes == ("found 2 of 4 shards of train; number 1 is missing",)
    assert len(load(tmp_path).train) == 6


def test_an_empty_first_row_group_raises_an_error(tmp_path: Path) -> None:
    table = parquet.read_table(write(tmp_path / "x.parquet", [0, 1] * 4, named("a", "b")))
    with parquet.ParquetWriter(tmp_path / "x.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert "x.parquet cannot be read as parquet: its first row group is empty" in refused(tmp_path)


def test_an_evaluation_split_is_used_for_training_only_on_request(tmp_path: Path) -> None:
    write(tmp_path / "test-0.parquet", [0, 1] * 4, named("a", "b"))
    assert "no training split, only test; use train_split=test" in refused(tmp_path)
    assert len(load(tmp_path, train_split="test").train) == 6


@mark.parametrize("name", ["-", "-x/y", "a" * 5000])
def test_invalid_dataset_ids_are_not_requested_from_the_hub(name: str) -> None:
    assert "does not exist and is not a valid dataset ID on the Hub" in refused(name)


def test_class_folders_beside_parquet_files_of_images_raise_an_error(tmp_path: Path) -> None:
    fill(tmp_path, classes())
    write(tmp_path / "extra.parquet", [0, 1], named("a", "b"))
    assert "(extra.parquet); move one of them elsewhere" in refused(tmp_path)


def test_saved_datasets_keep_their_splits(tmp_path: Path) -> None:
    train = datasets.Dataset.from_parquet(str(write(tmp_path / "a.parquet", [0, 1] * 4, named("a", "b"))))
    test = datasets.Dataset.from_parquet(str(write(tmp_path / "b.parquet", [0, 1], named("b", "a"))))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.shuffle(seed=0).save_to_disk(tmp_path / "one")
    both = load(tmp_path / "both")
    assert (both.label_names, both.eval.labels.tolist()) == (("a", "b"), [1, 0])
    assert both.eval.image(0).size == (8, 8)
    one = load(tmp_path / "one")
    assert len(one.train) + len(one.eval) == 8


@fixture
def saved(tmp_path: Path) -> Path:
    """A saved dataset with a training and a test split, in a folder that fsspec would interpret as chained URLs."""
    table = datasets.Dataset.from_parquet(str(write(tmp_path / "a.parquet", [0, 1] * 4, named("a", "b"))))
    datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(tmp_path / "saved")
    return (tmp_path / "saved").rename(tmp_path / "saved::here")


def test_a_saved_dataset_may_have_any_path_and_format(saved: Path) -> None:
    state = json.loads((saved / "train" / "state.json").read_text())
    (saved / "train" / "state.json").write_text(json.dumps(state | {"_format_type": "tensorflow"}))
    assert load(saved).train.labels.tolist() == [0, 1] * 4


SAVED = "train/data-00000-of-00001.arrow"


@mark.parametrize(
    ("name", "content", "words"),
    [
        (SAVED, None, "train/data-00000-of-00001.arrow, saved by datasets.save_to_disk, cannot be read: not a"),
        ("train/state.json", None, "state.json cannot be read: not a regular file but a FIFO"),
        ("test/dataset_info.json", None, "dataset_info.json cannot be read: not a regular file but a FIFO"),
        (SAVED, b"x" * 100, "data-00000-of-00001.arrow, saved by"),
        (SAVED, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        ("train/state.json", b"[]", "state.json is damaged (Expected `object`, got `array`)"),
        (
            "train/state.json",
            b'{"_data_files": [{"filename": "/dev/zero"}]}',
            "lists /dev/zero, which is not a file name",
        ),
        ("train/state.json", b'{"_data_files": [{"filename": "../../a.arrow"}]}', "lists ../../a.arrow"),
        ("train/state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow, saved by"),
        (
            "test/state.json",
            b'{"_data_files": []}',
            "test has no rows (split test); save the dataset without this split",
        ),
        (
            "train/state.json",
            b'{"_data_files": [{"filename": "x"}], "_indices_data_files": [{"filename": "indices.arrow"}]}',
            "has an indices mapping in an old format",
        ),
        ("dataset_dict.json", b'{"splits": []}', "lists no splits"),
        ("dataset_dict.json", b'{"splits": ["../saved"]}', "lists ../saved, which is not a file name"),
        ("dataset_dict.json", b'{"splits": ["train", "other"]}', "other/state.json cannot be read: No such file"),
        (
            "train/dataset_info.json",
            b'{"features": {"image": {"_type": "Image"}}}',
            "train, saved by datasets.save_to_disk, cannot be read",
        ),
        ("train/dataset_info.json", b'{"features": 5}', "train, saved by datasets.save_to_disk, cannot be read"),
    ],
)
def test_a_damaged_saved_dataset_raises_an_error_with_the_file(
    saved: Path, name: str, content: bytes | None, words: str
) -> None:
    (saved / name).unlink()
    if content is None:
        os.mkfifo(saved / name)
    else:
        (saved / name).write_bytes(content)
    assert words in refused(saved)


def test_an_empty_split_of_a_saved_dataset_raises_an_error(tmp_path: Path) -> None:
    table = datasets.Dataset.from_parquet(str(write(tmp_path / "a.parquet", [0, 1] * 4, named("a", "b"))))
    datasets.DatasetDict({"train": table, "test": table.select([])}).save_to_disk(tmp_path / "both")
    assert "both/test has no rows (split test); save the dataset without this split" in refused(tmp_path / "both")


def not_utf8(count: int) -> pyarrow.StringArray:
    """Return the text `\xff` for each row, which Arrow and parquet store without validation."""
    offsets = np.arange(count + 1, dtype=np.int32).tobytes()
    return pyarrow.StringArray.from_buffers(count, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"\xff" * count))


def test_labels_that_are_not_utf8_raise_an_error(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": [PNG] * 4, "label": not_utf8(4)}), tmp_path / "train.parquet")
    assert "column label of the training split is damaged (In chunk 0: Invalid: Invalid UTF8" in refused(tmp_path)


@mark.parametrize("content", [PNG, None])
def test_a_path_in_parquet_that_is_not_utf8_works_and_prints_escaped(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / os.fsdecode(b"\xff")).write_bytes(PNG)
    images = pyarrow.StructArray.from_arrays(
        [pyarrow.array([content] * 8, pyarrow.binary()), not_utf8(8)], ["bytes", "path"]
    )
    parquet.write_table(pyarrow.table({"image": images, "label": ["a", "b"] * 4}), tmp_path / "train.parquet")
    train = load(tmp_path).train
    assert train.image(0).size == (8, 8)
    assert train.name(0).startswith("\\xff")


def test_a_stream_with_paths_that_are_not_utf8_is_read(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(decode=False), "label": named("a", "b")})
    images = pyarrow.StructArray.from_arrays(
        [pyarrow.array([PNG] * 8, pyarrow.binary()), not_utf8(8)], ["bytes", "path"]
    )
    for split in ("train", "test"):
        table = pyarrow.table({"image": images, "label": [0, 1] * 4}, schema=features.arrow_schema)
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    train = load(tmp_path, streaming=True).train
    records = list(train.records())
    assert len(records) == 8
    assert train.image(records[0]).size == (8, 8)
    assert records[0].name.startswith("\\xff")


@mark.parametrize("blank", ["", " ", "\u00a0", "\t"])
@mark.parametrize("streaming", [False, True])
def test_a_class_without_a_name_raises_an_error(tmp_path: Path, blank: str, streaming: bool) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [0, 1] * 4, named("a", blank))
    assert "has a class without a name (index 1 in a, " in refused(tmp_path, streaming=streaming)


def write_at(path: Path, labels: Sequence[object], time: int = 315532800, kind: object = None) -> Path:
    write(path, labels, kind or named("a", "b"))
    os.utime(path, (time, time))
    return path


@mark.parametrize("how", ["in place", "replaced", "other folder moved here"])
def test_changed_files_are_detected_in_spite_of_equal_modification_times(tmp_path: Path, how: str) -> None:
    write_at(tmp_path / "data" / "train.parquet", [0, 1, 0, 1, 1, 0])
    write_at(tmp_path / "data" / "test.parquet", [0, 1])
    assert load(tmp_path / "data").train.labels.tolist() == [0, 1, 0, 1, 1, 0]
    path = write_at(tmp_path / "new" / "train.parquet", [1, 0, 1, 0, 0, 1])
    if how == "in place":
        assert path.stat().st_size == (tmp_path / "data" / "train.parquet").stat().st_size
        write_at(tmp_path / "data" / "train.parquet", [1, 0, 1, 0, 0, 1])
    elif how == "replaced":
        path.replace(tmp_path / "data" / "train.parquet")
    else:
        (tmp_path / "data" / "test.parquet").rename(tmp_path / "new" / "test.parquet")
        shutil.rmtree(tmp_path / "data")
        (tmp_path / "new").rename(tmp_path / "data")
    assert load(tmp_path / "data").train.labels.tolist() == [1, 0, 1, 0, 0, 1]


@mark.parametrize("image", [PNG, bytes(5000)])
def test_changed_labels_are_detected_without_change_times(
    tmp_path: Path, image: bytes, monkeypatch: MonkeyPatch
) -> None:
    own = os.fstat

    def timeless(descriptor: int) -> SimpleNamespace:
        return SimpleNamespace(st_size=own(descriptor).st_size, st_mtime_ns=0, st_ctime_ns=0, st_mode=0o100644)

    versions = []
    for labels in ([0, 1] * 50, [1, 0] * 50):
        rows = [{"bytes": image, "path": None}] * len(labels)
        write(tmp_path / "train.parquet", labels, named("a", "b"), rows)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", timeless)
            versions.append(_version_of(tmp_path, ["train.parquet"]))
    assert versions[0] != versions[1]


def test_detecting_changes_does_not_read_images(tmp_path: Path) -> None:
    contents = np.random.default_rng(0)
    rows = [{"bytes": contents.bytes(2000), "path": None} for _ in range(1000)]
    path = write(tmp_path / "train.parquet", [0, 1] * 500, named("a", "b"), rows)
    assert path.stat().st_size > 2_000_000
    with open(path, "rb") as file:
        assert 0 < sum(length for _, length in _small_columns(file)) < 10_000


def test_an_unchanged_file_is_cached_once(tmp_path: Path) -> None:
    write_at(tmp_path / "train.parquet", [0, 1] * 4)
    first, again = (opened(tmp_path).tables["train"] for _ in range(2))
    assert first.cache_files == again.cache_files
    assert not isinstance(first.data, datasets.table.InMemoryTable)


def test_a_file_that_changes_while_it_is_read_raises_an_error(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    path = write_at(tmp_path / "train.parquet", [0, 1] * 4)
    library = datasets.load_dataset

    def late(*args: object, **settings: object) -> object:
        write_at(path, [1, 0] * 4)
        return library(*args, **settings)

    monkeypatch.setattr(datasets, "load_dataset", late)
    with raises(RunError, match="changed while it was being read; rerun the same command"):
        opened(tmp_path)


@mark.parametrize("name", ["a::b/train.parquet", "train::x.parquet", "zip://x::y/train.parquet"])
def test_a_path_that_looks_like_chained_urls_raises_an_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [0, 1] * 4, named("a", "b"))
    assert "contains '::'" in refused(path.parent)
    assert "contains '::'" in refused(path, streaming=True)


@mark.parametrize(
    ("first", "second", "names"),
    [
        (("int8", [0, 1]), ("int64", [300, 1]), ("0", "1", "300")),
        (("uint8", [200, 1]), ("int8", [-3, 1]), ("-3", "1", "200")),
        (("int64", [70000, 1]), ("int16", [5, 1]), ("1", "5", "70000")),
        (("uint64", [7, 1]), ("uint8", [5, 1]), ("1", "5", "7")),
    ],
)
def test_integer_labels_get_the_widest_type_of_all_shards(
    tmp_path: Path, first: tuple[str, list[int]], second: tuple[str, list[int]], names: tuple[str, ...]
) -> None:
    for shard, (kind, labels) in enumerate((first, second)):
        write(tmp_path / f"train-{shard}.parquet", labels * 4, datasets.Value(kind))
    assert load(tmp_path).label_names == names


@mark.parametrize(
    ("kind", "labels"),
    [("uint64", [2**63, 2**63 + 1]), ("int64", [2**40, 2**41]), ("uint32", [2**31, 2**32 - 1])],
)
def test_numbers_that_cannot_be_classes_raise_an_error(tmp_path: Path, kind: str, labels: list[int]) -> None:
    write(tmp_path / "train.parquet", labels * 4, datasets.Value(kind))
    assert (
        f"has the label {labels[0]}, which does not look like a class: expected -2147483648 to 2147483647"
        in refused(tmp_path)
    )


def test_shards_with_incompatible_integers_raise_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [-1, 1] * 4, datasets.Value("int8"))
    write(tmp_path / "train-1.parquet", [2**63, 1] * 4, datasets.Value("uint64"))
    assert "cannot be read as parquet" in refused(tmp_path)


def test_a_git_lfs_pointer_raises_an_error_with_the_command_to_run(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (tmp_path / "train.parquet").write_text(pointer)
    assert "git lfs pull" in refused(tmp_path)


@mark.parametrize("name", ["with [1] and *", "what?", "hf:", "zip:", "a%20b", "a#b", "{x}"])
def test_folder_names_may_look_like_patterns(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "train.parquet", [0, 1] * 2, named("a", "b"))
    write(tmp_path / name / "test.parquet", [0, 1] * 2, named("a", "b"))
    assert len(load(tmp_path / name).eval) == 4


def test_an_unwritable_cache_raises_an_error(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 2, named("a", "b"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/x/datasets")
    assert "the cache /dev/null/x/datasets is not writable (not a directory); set HF_HOME" in refused(tmp_path)


# The bundled digits and runs


def test_a_local_folder_called_digits_requires_a_decision(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, classes("digits/"))
    assert "use dataset=./digits for the local one, or dataset=bundled:digits" in refused("digits")
    assert load("./digits").label_names == ("cat", "dog")
    assert load("bundled:digits").dataset_id == "digits"
    assert "no such bundled dataset; the only one is bundled:digits" in refused("bundled:mnist")
    check_source(DataConfig(dataset="bundled:digits"))
    assert dataset_name(DataConfig(dataset="bundled:digits")) == "digits"
    assert dataset_name(DataConfig(dataset=".")) == tmp_path.name


def test_the_training_split_cannot_be_the_evaluation_split(tmp_path: Path) -> None:
    fill(tmp_path, SPLITS)
    assert "eval_split=train is also the training split" in refused(tmp_path, eval_split="train")


@fixture
def inside(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    for name, shade in (("cat", 40), ("dog", 200)):
        for i in range(6):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(png(shade + i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_inside_its_dataset_does_not_change_the_dataset(
    inside: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("train", *TINY, "--dataset", ".", "--image-size", 32, "--max-steps", 2, "--batch-size", 4)
    code, out, err = command(*words)
    assert code == 0, err
    assert "(held out, 25 %)" in err
    code, out, _ = command(*words)
    assert (code, "is already finished" in out) == (0, True)
