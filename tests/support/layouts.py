"""Write one small dataset in every layout that is read without a flag: `python tests/support/layouts.py FOLDER`."""

import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from PIL import Image

NAMES = ("2 wheels", 'Müller\'s | "bus"')
"""Two classes with spaces, quotes, a leading digit and a letter that is not ASCII."""

PLAIN = ("bus", "car")

PER_CLASS = 6


@dataclass(frozen=True)
class Layout:
    """A layout, and what has to be found in it."""

    write: Callable[[Path], Path]
    """Writes the dataset into a folder, and returns the path to pass as `--dataset`."""
    names: tuple[str, ...] = PLAIN
    train: int = 9
    """Training images; by default a quarter of each class is held out of 12."""
    eval: int = 3


def image(number: int) -> bytes:
    """An encoded image that differs from all others."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (20 * number % 256, 200, 255 - 7 * number)).save(buffer, format="JPEG")
    return buffer.getvalue()


def samples(names: Sequence[str] = PLAIN, start: int = 0, count: int = PER_CLASS) -> Iterator[tuple[int, str, bytes]]:
    """Number, class and content of each image, class by class."""
    for number in range(count * len(names)):
        yield start + number, names[number // count], image(start + number)


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def folders(root: Path, names: Sequence[str] = PLAIN, below: str = "", start: int = 0) -> Path:
    for number, name, content in samples(names, start):
        put(root / name / below / f"{number:03}.jpg", content)
    return root


def splits(*found: str, wrapper: str = "") -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        for index, split in enumerate(found):
            folders(root / wrapper / split, start=100 * index)
        return root

    return write


def table(
    path: str, header: str, row: str, folder: str = "images", given: bool = False, split: bool = False
) -> Callable[[Path], Path]:
    """Images in one folder and a table; `row` is formatted with file, name, and split."""

    def write(root: Path) -> Path:
        lines = [header] if header else []
        for number, name, content in samples():
            file = f"{number:03}.jpg"
            put(root / folder / file, content)
            lines.append(row.format(file=file, name=name, split="val" if split and number % 3 == 0 else "train"))
        put(root / path, "\n".join(lines) + "\n")
        return root / path if given else root

    return write


def metadata(root: Path) -> Path:
    """The layout of the Hub's ImageFolder: a metadata.csv in each split."""
    for index, split in enumerate(("train", "test")):
        lines = ["file_name,label"]
        for number, name, content in samples(start=100 * index):
            put(root / split / f"{number}.jpg", content)
            lines.append(f"{number}.jpg,{name}")
        put(root / split / "metadata.csv", "\n".join(lines) + "\n")
    return root


def files_of(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(root)), path.read_bytes()


def zipped(write: Callable[[Path], Path], top: str = "") -> Callable[[Path], Path]:
    """A zip file as macOS makes it."""

    def write_zip(root: Path) -> Path:
        write(root / "content")
        with zipfile.ZipFile(root / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files_of(root / "content"):
                archive.writestr(f"{top}{name}", content)
                archive.writestr(f"__MACOSX/{top}{Path(name).parent}/._{Path(name).name}", b"\0\5\x16\7")
            archive.writestr(f"{top}.DS_Store", b"\0")
        return root / "photos.zip"

    return write_zip


def tarred(write: Callable[[Path], Path], suffix: str, top: str = "") -> Callable[[Path], Path]:
    def write_tar(root: Path) -> Path:
        write(root / "content")
        path = root / f"photos{suffix}"
        with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as archive:
            for name, content in files_of(root / "content"):
                add(archive, f"{top}{name}", content)
        return path

    return write_tar


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def shards(*found: str, kind: str = "cls", names: str = "") -> Callable[[Path], Path]:
    """WebDataset shards; each has every class."""

    def write(root: Path) -> Path:
        for index, shard in enumerate(found):
            root.mkdir(parents=True, exist_ok=True)
            with tarfile.open(root / shard, "w") as archive:
                for number, name, content in samples(start=100 * index):
                    label = str(PLAIN.index(name)) if kind == "cls" else json.dumps({"label": name, "width": 40})
                    add(archive, f"{number:06}.jpg", content)
                    add(archive, f"{number:06}.{kind}", label.encode())
        if names:
            put(root / "classes.txt", names)
        return root if len(found) > 1 or names else root / found[0]

    return write


def saved(as_dict: bool) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        found = {split: dataset(100 * index) for index, split in enumerate(("train", "test"))}
        whole = datasets.DatasetDict(found) if as_dict else found["train"]
        whole.save_to_disk(root / "saved")
        return root / "saved"

    return write


def dataset(start: int = 0, integers: bool = False, paths: Path | None = None) -> datasets.Dataset:
    rows = list(samples(start=start))
    if paths:
        for number, _, content in rows:
            put(paths / f"{number}.jpg", content)
    images = [f"{number}.jpg" if paths else {"bytes": content, "path": None} for number, _, content in rows]
    label = datasets.Value("int64") if integers else datasets.ClassLabel(names=list(PLAIN))
    kind = datasets.Value("string") if paths else datasets.Image()
    return datasets.Dataset.from_dict(
        {"path" if paths else "image": images, "label": [PLAIN.index(name) for _, name, _ in rows]},
        features=datasets.Features({"path" if paths else "image": kind, "label": label}),
    )


def parquet(*found: str, integers: bool = False) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(found):
            dataset(100 * index, integers).to_parquet(root / name)
        return root

    return write


def parquet_of_paths(root: Path) -> Path:
    dataset(integers=True, paths=root / "images").to_parquet(root / "labels.parquet")
    return root


TWO = {"train": 12, "eval": 12}

LAYOUTS = {
    "class folders": Layout(folders),
    "class folders with unusual names": Layout(lambda root: folders(root, NAMES), NAMES),
    "train, val and test folders": Layout(splits("train", "val", "test"), **TWO),
    "training and validation folders": Layout(splits("Training", "Validation"), **TWO),
    "one more folder around the splits": Layout(splits("train", "test", wrapper="animals"), **TWO),
    "nested class folders": Layout(lambda root: folders(root, below="more/deep")),
    "a class called train": Layout(lambda root: folders(root, ("bus", "car", "train")), ("bus", "car", "train"), 13, 5),
    "images and labels.csv": Layout(table("labels.csv", "filename,label", "{file},{name}")),
    "images and a table without header": Layout(table("labels.csv", "", "images/{file},{name}")),
    "images and table in one folder": Layout(table("labels.csv", "file,class", "{file},{name}", folder=".")),
    "a TSV table with splits as the dataset": Layout(
        table("all.tsv", "image\ttarget\tsplit", "images/{file}\t{name}\t{split}", given=True, split=True),
        train=8,
        eval=4,
    ),
    "a JSONL table as the dataset": Layout(
        table("all.jsonl", "", '{{"path": "images/{file}", "label": "{name}"}}', given=True)
    ),
    "metadata.csv in train and test": Layout(metadata, **TWO),
    "metadata.jsonl with a split column": Layout(
        table(
            "metadata.jsonl",
            "",
            '{{"file_name": "images/{file}", "label": "{name}", "split": "{split}"}}',
            split=True,
        ),
        train=8,
        eval=4,
    ),
    "a zip file of class folders": Layout(zipped(folders, top="photos/")),
    "a zip file of images and a table": Layout(zipped(table("labels.csv", "file,label", "{file},{name}"))),
    "a tar file of split folders": Layout(tarred(splits("train", "test"), ".tar"), **TWO),
    "a tar.gz file of class folders": Layout(tarred(folders, ".tar.gz", top="./data/")),
    "one WebDataset shard": Layout(shards("photos.tar"), ("0", "1")),
    "WebDataset shards with classes.txt": Layout(
        shards("train-000000.tar", "train-000001.tar", "val-000000.tar", names="bus\ncar\n"), train=24, eval=12
    ),
    "WebDataset shards with JSON labels": Layout(shards("train-000000.tar", "test-000000.tar", kind="json"), **TWO),
    "Dataset.save_to_disk": Layout(saved(as_dict=False)),
    "DatasetDict.save_to_disk": Layout(saved(as_dict=True), **TWO),
    "parquet files": Layout(parquet("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), **TWO),
    "parquet with integer labels": Layout(parquet("all.parquet", integers=True), ("0", "1")),
    "parquet of paths": Layout(parquet_of_paths, ("0", "1")),
}
"""All layouts by name."""


if __name__ == "__main__":
    for layout_name, layout in LAYOUTS.items():
        print(layout.write(Path(sys.argv[1]) / layout_name.replace(" ", "-")))
