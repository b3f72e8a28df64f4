"""Tables of many rows: the work per row and the memory per row do not grow with the number of rows."""

import hashlib
import json
import tracemalloc
from pathlib import Path

from PIL import Image
from pytest import mark
from support.counting import calls_of

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources import open_source
from resnext_hub.data.sources.finders import ImageFinder
from resnext_hub.data.sources.table_columns import Table
from resnext_hub.data.sources.texts import Files, TextColumn, Texts
from resnext_hub.data.sources.walk import Tree
from resnext_hub.data.splits import load_splits

MANY = 70_000
"""More rows than a chunk of Arrow memory has."""


def few_images(root: Path) -> Path:
    """Write ten images, and a table whose rows name them again and again."""
    (root / "images").mkdir()
    for number in range(10):
        Image.new("L", (8, 8), 20 * number).save(root / f"images/{number}.png")
    rows = (f"images/{row % 10}.png,{('cat', 'dog')[row % 2]}" for row in range(MANY))
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))
    return root / "labels.csv"


def test_rows_that_name_the_same_files_again_and_again_are_opened(tmp_path: Path) -> None:
    table = few_images(tmp_path)
    for dataset in (table, tmp_path):
        splits = load_splits(DataConfig(dataset=str(dataset)))
        assert (len(splits.train), len(splits.eval), splits.label_names) == (8, 2, ("cat", "dog"))


def test_the_memory_of_a_table_is_a_few_bytes_per_row(tmp_path: Path) -> None:
    table = few_images(tmp_path)
    load_splits(DataConfig(dataset=str(table)))  # imports, and fills caches
    tracemalloc.start()
    load_splits(DataConfig(dataset=str(table)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # two copies of the text while it is decoded, and one chunk of Python strings; lists of cells would take 200 a row
    assert peak < 2.5 * table.stat().st_size + 130 * (1 << 16) + (1 << 20)


@mark.parametrize("inside", ["left", "train"])
def test_the_work_per_row_is_constant_if_all_images_have_one_name(inside: str, tmp_path: Path) -> None:
    def work(files: int) -> int:
        tree = Tree(
            root=tmp_path, images=[f"{split}/{i:06}/left/x.png" for split in ("test", inside) for i in range(files)]
        )
        find = ImageFinder(tree)
        # the first names are ambiguous, and those in train.csv are looked for below train/
        table = Table("train.csv" if inside == "train" else "labels.csv", {})
        names = [name for i in range(files) for name in ("x", "left/x.png", f"{i:06}/left/x.png", "other/x.png")]
        return calls_of(lambda: [find.candidates(table, name) for name in names])

    assert work(800) < 2.5 * work(400)


def test_an_image_is_found_by_the_end_of_its_path(tmp_path: Path) -> None:
    images = ["test/a/x.png", "test/b/y.png", "train/a/x.png", "train/a/é.jpg"]
    find = ImageFinder(Tree(root=tmp_path / "photos", images=images))
    train, other = Table("train.csv", {}), Table("labels.csv", {})
    assert find(train, "x") == find(train, "a/x.png") == find(train, "train/a/x") == find(other, "train/a/x.png") == 2
    assert find(other, "y") == find(other, "photos/test/b/y.png") == find(other, "b/y") == 1
    assert find(other, "e\u0301.jpg") == find(other, "a/e\u0301") == 3
    assert find.candidates(other, "x") == (0, 2)
    for name in ("z", "c/x.png", "b/x.png", "", "/", "a", "png", f"{'a/' * 99}x.png"):
        assert find(other, name) is None


@mark.parametrize("count", [0, 1, (1 << 16) - 1, 1 << 16, MANY])
def test_a_sequence_of_texts_equals_the_list_of_its_values(count: int) -> None:
    values = [f"name {number}" for number in range(count)]
    texts = Texts(values)
    assert list(texts) == values
    assert len(texts) == count
    assert texts[:: max(1, count // 7)] == values[:: max(1, count // 7)]
    for place in {0, -1, count // 2} if count else ():
        assert texts[place] == values[place]


@mark.parametrize(
    ("texts", "values"),
    [
        (["1", "", "-20"], [1, None, -20]),
        (["007", "1"], ["007", "1"]),
        (["1.5", "", "2"], [1.5, None, 2.0]),
        (["1", "cat", ""], ["1", "cat", None]),
        (["", ""], [None, None]),
        (["123456789012345678901234567890"], [123456789012345678901234567890]),
    ],
)
def test_a_text_column_has_numbers_only_if_all_its_values_are(texts: list[str], values: list[object]) -> None:
    column = TextColumn(texts)
    assert list(column) == column[:] == [column[i] for i in range(len(texts))] == values
    assert column == TextColumn(iter(texts))
    assert column != TextColumn([*texts, "x"])


def test_files_keep_names_that_are_not_utf8() -> None:
    names = ["a.png", "\udcff.png", "é.png"]
    assert list(Files(names, [1, -1, 3], [2, 1])) == [("é.png", 3), ("\udcff.png", -1)]


def test_the_fingerprint_is_that_of_the_whole_list_of_files(tmp_path: Path) -> None:
    table = few_images(tmp_path)
    splits = load_splits(DataConfig(dataset=str(table)))
    files = list(open_source(DataConfig(dataset=str(table))).files)
    digest = hashlib.sha256(json.dumps([["cat", "dog"], files]).encode())
    for labels in (splits.train.labels, splits.eval.labels):
        digest.update(len(labels).to_bytes(8, "little") + labels.astype("<i8").tobytes())
    assert splits.fingerprint == digest.hexdigest()
