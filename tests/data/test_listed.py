"""A table of any name, found beside images without class folders or requested itself, defines their labels."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import datasets
from PIL import Image
from pytest import LogCaptureFixture, fixture, mark, raises

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources import open_source
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError

NAMES = [f"{number:03}" for number in range(10)]


def label(number: int) -> str:
    return ("dog", "cat")[number % 2]


def write_images(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100).save(root / path)


def write(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def load(dataset: Path, **settings: object) -> Splits:
    # the images of these tests are copies of each other
    return load_splits(DataConfig(dataset=str(dataset), **{"group_duplicates": False, **settings}))


def rows_of(dataset: Path) -> dict[str, list[tuple[str, object]]]:
    """The rows of each split: path relative to the folder of the dataset, and label."""
    root = dataset if dataset.is_dir() else dataset.parent
    tables = open_source(DataConfig(dataset=str(dataset))).tables
    return {
        split: [(str(Path(row["image"]["path"]).relative_to(root)), row["label"]) for row in table]
        for split, table in tables.items()
    }


def refused(dataset: Path, **settings: object) -> str:
    with raises(RequestError) as raised:
        load(dataset, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def counts(splits: Splits) -> tuple[int, int]:
    return len(splits.train), len(splits.eval)


@fixture
def photos(tmp_path: Path) -> Path:
    """A folder with ten images in images/."""
    write_images(tmp_path / "photos", (f"images/{name}.png" for name in NAMES))
    return tmp_path / "photos"


def labelled(row: Callable[[str, str], str]) -> list[str]:
    return [row(name, label(number)) for number, name in enumerate(NAMES)]


TABLES = {
    "file names without folders": ("labels.csv", ["filename,label", *labelled("{}.png,{}".format)]),
    "paths": ("labels.csv", ["file,class", *labelled("images/{}.png,{}".format)]),
    "no header": ("labels.csv", labelled("images/{}.png,{}".format)),
    "no header, labels first": ("labels.csv", labelled(lambda name, of: f"{of},{name}.png")),
    "names without suffix": ("labels.csv", ["id,breed", *labelled("{},{}".format)]),
    "tabs": ("annotations.tsv", ["image\ttarget", *labelled("{}.png\t{}".format)]),
    "semicolons": ("labels.csv", ["image;target", *labelled("{}.png;{}".format)]),
    "backslashes": ("labels.csv", ["path,label", *labelled("images\\{}.png,{}".format)]),
    "JSON lines": (
        "labels.jsonl",
        labelled(lambda name, of: json.dumps({"path": f"{name}.png", "label": of})),
    ),
    "inside the folder of images": ("images/labels.csv", ["name,label", *labelled("{}.png,{}".format)]),
    "headerless metadata.csv": ("metadata.csv", labelled("images/{}.png,{}".format)),
}


@mark.parametrize("name", TABLES)
def test_a_table_is_found_beside_the_images_or_requested_itself(name: str, photos: Path) -> None:
    path, rows = TABLES[name]
    write(photos / path, *rows)
    for dataset in (photos, photos / path):
        found = load(dataset)
        assert found.label_names == ("cat", "dog")
        assert counts(found) == (8, 2)
        every = [*found.train.labels, *found.eval.labels]
        assert sum(every) == 5


def test_a_parquet_table_of_paths_is_read(photos: Path) -> None:
    columns = {"path": [f"images/{name}.png" for name in NAMES], "label": [label(i) for i in range(10)]}
    datasets.Dataset.from_dict(columns).to_parquet(photos / "labels.parquet")
    assert counts(load(photos)) == counts(load(photos / "labels.parquet")) == (8, 2)


def test_each_image_has_the_label_of_its_row(photos: Path) -> None:
    write_images(photos, ["more/x.png"])
    rows = (f"{name}.png,class {name[2]},train" for name in reversed(NAMES))
    found = rows_of(write(photos / "labels.csv", "file,label,split", *rows, "more/x.png,class 0,val"))
    assert dict(found["train"]) == {f"images/{name}.png": f"class {name[2]}" for name in NAMES}
    assert found["val"] == [("more/x.png", "class 0")]


def test_a_split_column_is_used(photos: Path) -> None:
    rows = [f"{name}.png,{label(i)},{('train', 'val')[i > 6]}" for i, name in enumerate(NAMES)]
    write(photos / "labels.csv", "file,label,split", *rows)
    assert counts(load(photos)) == (7, 3)


def test_tables_that_are_named_like_splits_are_the_splits(tmp_path: Path) -> None:
    write_images(tmp_path, (f"{split}/{name}.png" for split in ("train", "val", "test") for name in NAMES))
    for split, number in (("train", 10), ("val", 4)):
        write(tmp_path / f"{split}.csv", "id,label", *(f"{NAMES[i]},{label(i)}" for i in range(number)))
    write(tmp_path / "test.csv", "id", *NAMES)  # without labels
    assert counts(load(tmp_path)) == (10, 4)
    assert rows_of(tmp_path)["val"] == [(f"val/{NAMES[i]}.png", label(i)) for i in range(4)]


def test_paths_may_be_absolute_or_lead_out_of_the_folder_of_the_table(photos: Path) -> None:
    absolute = write(photos / "x/absolute.csv", *labelled(lambda name, of: f"{photos}/images/{name}.png,{of}"))
    relative = write(photos / "x/relative.csv", *labelled("../images/{}.png,{}".format))
    assert counts(load(absolute)) == counts(load(relative)) == (8, 2)


def test_a_requested_table_wins_over_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path, (f"{label(i)}/{name}.png" for i, name in enumerate(NAMES)))
    table = write(tmp_path / "labels.csv", "file,label", *(f"{name}.png,{i % 5}" for i, name in enumerate(NAMES)))
    assert load(table).label_names == ("0", "1", "2", "3", "4")
    assert f"use dataset={table}" in refused(tmp_path)
    assert load(tmp_path, layout="classes").label_names == ("cat", "dog")


def test_only_the_folders_of_a_requested_table_are_listed(photos: Path, caplog: LogCaptureFixture) -> None:
    table = write(photos / "labels.csv", *labelled("images/{}.png,{}".format))
    (photos / "elsewhere").symlink_to("/nonexistent/folder")
    write_images(photos, ["more/x.png"])
    caplog.set_level("INFO")
    assert counts(load(table)) == (8, 2)
    assert "elsewhere" not in caplog.text
    assert "without a row" not in caplog.text


def test_rows_without_a_file_and_files_without_a_row_are_counted(photos: Path, caplog: LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write(photos / "labels.csv", "file,label", *labelled("{}.png,{}".format)[3:], "none.png,cat")
    assert counts(load(photos)) == (5, 2)
    assert "ignored 1 rows whose file does not exist, such as none.png" in caplog.text
    assert "ignored 3 images without a row, such as images/000.png" in caplog.text


def test_an_image_listed_twice_with_different_labels_raises_an_error(photos: Path) -> None:
    write(photos / "labels.csv", "file,label", *labelled("{}.png,{}".format), "images/000.png,bird")
    assert "images/000.png has two labels in" in refused(photos)


@mark.parametrize(
    ("rows", "words"),
    [
        (["size,label", *labelled(lambda _, of: f"100,{of}")], "its table labels.csv does not list its images"),
        (["file,kind,sort", *labelled("{}.png,{},x".format)], "its columns: file_name, kind, sort; choose one with"),
        (["file,label", *labelled("{}.png,{},x".format)], "(row 2 has 3 columns, but the first row has 2)"),
        (["file", *(f"{name}.png" for name in NAMES)], "does not list its images"),
        (['file,label\n"000.png,cat'], "cannot be read as csv"),
        ([], "does not list its images"),
    ],
)
def test_a_table_that_defines_no_labels_raises_an_error(rows: Sequence[str], words: str, photos: Path) -> None:
    write(photos / "labels.csv", *rows)
    assert words in refused(photos)


def test_a_requested_table_without_existing_files_raises_an_error(photos: Path) -> None:
    table = write(photos / "labels.csv", "file,label", *labelled("no{}.png,{}".format))
    assert "none of the images that it lists exists, for example no000.png; expected paths relative" in refused(table)
    assert "convert it to CSV" in refused(write(photos / "labels.json", "[]"))


def test_ambiguous_names_and_tables_raise_an_error_that_names_the_choices(tmp_path: Path) -> None:
    write_images(tmp_path, (f"{folder}/{name}.png" for folder in ("train", "test") for name in NAMES))
    one = write(tmp_path / "one.csv", "file,label", *labelled("{}.png,{}".format))
    assert "the file name 000.png in a table matches several images (test/000.png, train/000.png)" in refused(one)
    write(one, "file,label", *labelled("train/{}.png,{}".format))
    write(tmp_path / "two.csv", "file,label", *labelled("test/{}.png,{}".format))
    assert f"several tables that list its images (one.csv, two.csv); choose one, such as dataset={one}" in refused(
        tmp_path
    )


def test_a_row_does_not_match_an_image_in_a_folder_of_another_name(tmp_path: Path) -> None:
    write_images(tmp_path, [*(f"images/{name}.png" for name in NAMES), "other/999.png"])
    table = write(tmp_path / "labels.csv", "file,label", *labelled("images/{}.png,{}".format), "images/999.png,cat")
    assert counts(load(table)) == (8, 2)


def test_a_running_index_is_not_taken_for_the_names_of_images(tmp_path: Path) -> None:
    write_images(tmp_path, (f"{number}.png" for number in range(10)))
    rows = (f"{number},{9 - number}.png,{label(number)}" for number in range(10))
    write(tmp_path / "labels.csv", "id,filename,label", *rows)
    assert dict(rows_of(tmp_path)["train"]) == {f"{9 - number}.png": label(number) for number in range(10)}


def test_columns_with_the_names_of_different_images_raise_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, (f"{folder}/{name}.png" for folder in ("images", "masks") for name in NAMES))
    table = write(tmp_path / "x.csv", "mask,image,label", *labelled("masks/{0}.png,images/{0}.png,{1}".format))
    assert (
        "the columns mask and image of x.csv contain the names of different images; keep only one of them"
        in refused(table)
    )


def test_an_image_outside_the_folder_of_its_split_is_not_taken(tmp_path: Path) -> None:
    write_images(tmp_path, [*(f"train/{name}.png" for name in NAMES[1:]), *(f"test/{name}.png" for name in NAMES)])
    write(tmp_path / "train.csv", "id,label", *labelled("{},{}".format))
    assert "test/000.png" not in dict(rows_of(tmp_path)["train"])
    write_images(tmp_path / "b", (f"{name}.png" for name in NAMES))
    table = write(tmp_path / "b/t.csv", "file,label", *labelled("{}.png,{}".format)[1:], "val/000.png,bird")
    assert load(table).label_names == ("cat", "dog")


def test_a_damaged_table_of_a_split_raises_an_error_though_another_table_is_readable(photos: Path) -> None:
    write(photos / "val.csv", "file,label", *labelled("{}.png,{}".format)[:4])
    write(photos / "train.csv", "file,label", *labelled("{}.png,{}".format)[4:], "x.png,cat,one too many")
    assert "train.csv cannot be read as csv" in refused(photos)


def test_a_header_that_is_the_name_of_an_image_stays_a_header(tmp_path: Path) -> None:
    write_images(tmp_path, [*(f"{name}.png" for name in NAMES), "image.png"])
    write(tmp_path / "labels.csv", "image,label", *labelled("{}.png,{}".format))
    assert load(tmp_path).label_names == ("cat", "dog")


def test_another_column_called_file_name_does_not_replace_the_file_names(photos: Path) -> None:
    write(photos / "labels.csv", "path,file_name,label", *labelled("images/{0}.png,original {0},{1}".format))
    assert counts(load(photos)) == (8, 2)
