"""`resnext-hub check` finds copies of images, unreadable images and unusual splits, and reports nothing else."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pytest import MonkeyPatch, fixture, mark, raises
from support.processes import TINY

from resnext_hub.check.findings import Findings, examine
from resnext_hub.check.survey import survey
from resnext_hub.data.config import DataConfig
from resnext_hub.data.duplicates import MAX_DISTANCE, _close, near_duplicates
from resnext_hub.data.examine import Examined, Facts
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError
from resnext_hub.record import RunRecord

Command = Callable[..., tuple[int, str, str]]

SIDE = 70


@fixture(scope="session")
def patches() -> list[Image.Image]:
    """Different parts of the two photographs that scikit-learn contains; parts without detail are left out."""
    from sklearn.datasets import load_sample_images

    found = []
    for photo in load_sample_images().images:
        for top in range(0, photo.shape[0] - SIDE, SIDE):
            for left in range(0, photo.shape[1] - SIDE, SIDE):
                patch = photo[top : top + SIDE, left : left + SIDE]
                if patch.mean(axis=2).std() > 25:
                    found.append(Image.fromarray(patch))
    assert len(found) > 40
    return found


@fixture
def photos(tmp_path: Path, patches: list[Image.Image]) -> Path:
    """Two classes of twelve different images in each of two splits."""
    root = tmp_path / "photos"
    for index, patch in enumerate(patches[:48]):
        split, name = ("train", "val")[index % 2], ("cat", "dog")[index // 2 % 2]
        path = root / split / name / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        patch.save(path)
    return root


def checked(root: Path, workers: int = 0) -> Findings:
    return examine(survey(DataConfig(dataset=str(root)), workers))


def names(findings: Findings) -> list[list[str]]:
    return [sorted(f"{facts.split}/{Path(facts.name).name}" for facts in group.images) for group in findings.groups]


def twin_of(image: Image.Image, generator: random.Random) -> bytes:
    """A copy that was resized to 50-150 %, perhaps mirrored, and compressed with quality 60-95."""
    scale = generator.uniform(0.5, 1.5)
    twin = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    twin = ImageOps.mirror(twin) if generator.random() < 0.5 else twin
    buffer = io.BytesIO()
    twin.save(buffer, format="JPEG", quality=generator.randint(60, 95))
    return buffer.getvalue()


def test_a_dataset_of_different_images_has_no_problems(photos: Path, command: Command) -> None:
    code, out, err = command("check", photos)
    assert code == 0
    assert out.endswith("no problems found\n")
    assert "duplicates" not in out + err.replace("duplicates:", "")


def test_resized_recompressed_and_mirrored_copies_are_found_and_nothing_else(photos: Path) -> None:
    generator = random.Random(0)
    originals = sorted(photos.glob("*/*/*.png"))[::2]
    for path in originals:
        (path.parent / f"{path.stem}-twin.jpg").write_bytes(twin_of(Image.open(path), generator))
    expected = {
        (f"{path.parent.parent.name}/{path.stem}-twin.jpg", f"{path.parent.parent.name}/{path.name}")
        for path in originals
    }
    found = {tuple(sorted(group)) for group in names(checked(photos))}
    assert len(found & expected) >= 0.95 * len(expected)
    assert not found - expected


def test_a_copy_that_exif_turns_upright_is_found(photos: Path) -> None:
    path = photos / "train/cat/00.png"
    turned = Image.open(path).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(photos / "train/cat/turned.jpg", quality=95, exif=exif)
    assert names(checked(photos)) == [["train/00.png", "train/turned.jpg"]]


def test_copies_across_splits_and_with_different_labels_are_problems(photos: Path, command: Command) -> None:
    content = (photos / "train/cat/00.png").read_bytes()
    (photos / "val/cat/leak.png").write_bytes(content)
    (photos / "train/dog/wrong.png").write_bytes((photos / "train/cat/04.png").read_bytes())
    code, out, err = command("check", photos)
    assert code == 1
    assert err.endswith(
        "error: 2 problems found; a problem is an unreadable image, or a group of duplicates across splits or with "
        "different labels\n"
    )
    assert (
        "duplicates with different labels: 1\n  train: cat/04.png (cat) = train: dog/wrong.png (dog)\n"
        "duplicates across splits: 1\n  train: cat/00.png = val: cat/leak.png\n"
    ) in out
    code, out, _ = command("check", photos, "--json")
    facts = json.loads(out)
    assert (code, facts["problems"]) == (1, 2)
    assert [(group["exact"], group["different_labels"], group["across_splits"]) for group in facts["duplicates"]] == [
        (True, True, False),
        (True, False, True),
    ]
    assert facts["duplicates"][1]["images"] == [
        {"split": "train", "row": 0, "name": "cat/00.png", "label": "cat"},
        {"split": "val", "row": 12, "name": "cat/leak.png", "label": "cat"},
    ]


def test_unreadable_and_blank_images_are_listed_and_not_compared(photos: Path, command: Command) -> None:
    (photos / "train/cat/empty.jpg").write_bytes(b"")
    (photos / "val/dog/text.jpg").write_text("no image")
    for split in ("train", "val"):
        Image.new("RGB", (50, 40), "white").save(photos / split / "cat/white.png")
        Image.new("RGB", (50, 40), "black").save(photos / split / "dog/black.png")
    findings = checked(photos)
    first, second = findings.unreadable
    assert (first.name, first.reason, second.name) == ("cat/empty.jpg", "zero bytes", "dog/text.jpg")
    assert [Path(facts.name).name for facts in findings.blank] == ["white.png", "black.png"] * 2
    code, out, _ = command("check", photos)
    assert code == 1
    assert "unreadable: 2\n  train: cat/empty.jpg: zero bytes\n" in out
    assert "single color: 4\n" in out


def test_all_splits_are_compared(photos: Path, command: Command) -> None:
    (photos / "test/cat").mkdir(parents=True)
    (photos / "test/cat/same.png").write_bytes((photos / "train/cat/00.png").read_bytes())
    code, out, _ = command("check", photos)
    assert code == 1
    assert out.startswith("class  train  val  test\ncat       12   12     1\ndog       12   12     0\n")
    assert "train: cat/00.png = test: cat/same.png" in out
    assert "classes without images in test: dog" in out
    assert "classes with fewer than 10 images in test: cat" in out


def test_an_imbalanced_dataset_is_described(photos: Path, command: Command) -> None:
    for path in sorted((photos / "train/dog").iterdir())[1:]:
        path.unlink()
    _, out, _ = command("check", photos)
    assert "imbalanced: the largest class has 12x as many training images as the smallest" in out
    assert f"sizes: smallest {SIDE} x {SIDE}, median {SIDE} x {SIDE}, largest {SIDE} x {SIDE}\nmodes: RGB 37\n" in out


def test_workers_find_the_same(photos: Path) -> None:
    (photos / "val/cat/leak.png").write_bytes((photos / "train/cat/00.png").read_bytes())
    alone, together = checked(photos), checked(photos, workers=2)
    assert alone == together


@fixture
def problems(photos: Path) -> Path:
    """A dataset with each kind of problem."""
    (photos / "val/cat/leak.png").write_bytes((photos / "train/cat/00.png").read_bytes())
    (photos / "train/dog/wrong.png").write_bytes((photos / "train/cat/04.png").read_bytes())
    (photos / "train/dog/again.png").write_bytes((photos / "train/dog/06.png").read_bytes())
    (photos / "train/cat/empty.jpg").write_bytes(b"")
    return photos


def test_a_list_of_images_to_exclude_leaves_no_problem(problems: Path, tmp_path: Path, command: Command) -> None:
    written = tmp_path / "exclude.txt"
    assert command("check", problems, "--write-exclude", written)[0] == 1
    _, *lines = map(json.loads, written.read_text().splitlines())
    assert [(split, Path(name).name, reason) for split, _, name, reason in lines] == [
        ("train", "empty.jpg", "unreadable: zero bytes"),
        ("train", "04.png", "duplicates with different labels"),
        ("train", "wrong.png", "duplicates with different labels"),
        ("train", "00.png", "duplicate of val: cat/leak.png"),
        ("train", "again.png", "duplicate of train: dog/06.png"),
    ]
    code, out, _ = command("check", problems, "--exclude", written)
    assert code == 0, out
    assert out.startswith("class  train  val\ncat       10   13\ndog       12   12\n")
    splits = load_splits(DataConfig(dataset=str(problems), exclude=str(written)))
    assert (len(splits.train), len(splits.eval)) == (22, 25)
    assert splits.fingerprint != load_splits(DataConfig(dataset=str(problems))).fingerprint
    before = written.read_text()
    assert command("check", problems, "--exclude", written, "--write-exclude", written)[0] == 0
    assert written.read_text() == before


def test_images_of_a_held_out_split_can_be_excluded(photos: Path, tmp_path: Path, command: Command) -> None:
    classes, written = photos / "train", tmp_path / "exclude.txt"
    for path in sorted(classes.glob("*/*.png"))[::5]:
        path.with_name(f"{path.stem}-copy.png").write_bytes(path.read_bytes())
    (classes / "cat" / "broken.png").write_bytes(b"no image")
    code, out, _ = command("check", classes, "--write-exclude", written)
    assert code == 1
    assert "duplicates within a split: 5" in out
    code, out, _ = command("check", classes, "--exclude", written)
    assert code == 0, out
    plain = DataConfig(dataset=str(classes))
    whole, splits = load_splits(plain), load_splits(replace(plain, exclude=str(written)))
    assert len(splits.train) + len(splits.eval) == len(whole.train) + len(whole.eval) - 6
    assert set(splits.eval.indices) <= set(whole.eval.indices)  # the others stay where they were


def test_duplicates_of_a_split_that_is_divided_are_problems_only_if_training_separates_them(
    photos: Path, command: Command
) -> None:
    classes = photos / "train"
    for path in sorted(classes.glob("*/*.png"))[::2]:
        path.with_name(f"{path.stem}-copy.png").write_bytes(path.read_bytes())
    assert command("check", classes)[0] == 0
    code, out, _ = command("check", classes, "--no-group-duplicates")
    assert code == 1
    assert "duplicates across splits" in out


@mark.parametrize("fractions", [{}, {"test_fraction": 0.2}], ids=["evaluation", "evaluation and test"])
def test_no_held_out_image_is_a_copy_of_another_one_in_training(photos: Path, fractions: dict[str, float]) -> None:
    generator = random.Random(1)
    for path in sorted(photos.glob("train/*/*.png"))[::2]:
        path.with_name(f"{path.stem}-twin.jpg").write_bytes(twin_of(Image.open(path), generator))
    config = DataConfig(dataset=str(photos / "train"), eval_fraction=0.25, **fractions)

    def owners(config: DataConfig) -> tuple[dict[str, str], list[int]]:
        splits = load_splits(config)
        parts = {"training": splits.train, **splits.evaluated}
        found = {images.name(i).split(".")[0]: part for part, images in parts.items() for i in range(len(images))}
        return found, [len(images) for images in parts.values()]

    def separated(found: dict[str, str]) -> int:
        return sum(part != found[name.removesuffix("-twin")] for name, part in found.items())

    (together, sizes), (apart, usual) = owners(config), owners(replace(config, group_duplicates=False))
    assert separated(together) <= 1  # not every twin is found
    assert separated(apart) >= 3
    assert sizes == usual  # other images take the places of those that moved
    assert owners(config)[0] == together


def test_a_split_without_duplicates_is_divided_as_without_the_search(photos: Path) -> None:
    config = DataConfig(dataset=str(photos / "train"))
    alone, searched = load_splits(replace(config, group_duplicates=False)), load_splits(config)
    assert searched.found.group_duplicates is True
    assert alone.fingerprint == searched.fingerprint
    assert np.array_equal(alone.eval.indices, searched.eval.indices)


def test_the_search_for_duplicates_runs_once_per_version_of_a_dataset(
    photos: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    config = DataConfig(dataset=str(photos / "train"))
    before = load_splits(config).eval.indices
    kept = list((tmp_path / "cache" / "duplicates").glob("*.json"))
    assert len(kept) == 1
    changed = kept[0].stat().st_mtime_ns
    assert np.array_equal(load_splits(config).eval.indices, before)
    assert kept[0].stat().st_mtime_ns == changed
    for damage in (b"[[0,", b"[[0, 999]]", b"[[0]]"):
        kept[0].write_bytes(damage)
        assert np.array_equal(load_splits(config).eval.indices, before)
    next((photos / "train" / "cat").glob("*.png")).unlink()
    load_splits(config)
    assert len(list((tmp_path / "cache" / "duplicates").glob("*.json"))) == 2


def test_each_image_column_has_its_own_duplicates(patches: list[Image.Image], tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({name: datasets.Image() for name in "ab"} | {"label": datasets.Value("string")})
    columns = {"a": patches[:24], "b": [patches[index // 2] for index in range(24)], "label": ["x", "y"] * 12}
    columns["label"] = [("x", "y")[index // 2 % 2] for index in range(24)]
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "data.parquet")
    for column in "ab":
        splits = load_splits(DataConfig(dataset=str(tmp_path / "set"), image_column=column, eval_fraction=0.25))
    pairs = set((splits.eval.indices // 2).tolist())
    assert not pairs & set((splits.train.indices // 2).tolist())


def test_grouping_duplicates_is_refused_where_nothing_is_held_out(photos: Path) -> None:
    with raises(RequestError, match="group_duplicates=True has no effect, because no images of"):
        load_splits(DataConfig(dataset=str(photos), group_duplicates=True))
    assert load_splits(DataConfig(dataset=str(photos))).found.group_duplicates is False


def test_a_dataset_of_pairs_is_divided_by_pairs(photos: Path) -> None:
    for path in sorted(photos.glob("train/*/*.png")):
        path.with_name(f"{path.stem}-copy.png").write_bytes(path.read_bytes())
    splits = load_splits(DataConfig(dataset=str(photos / "train"), eval_fraction=0.25))
    assert (len(splits.train), len(splits.eval)) == (36, 12)
    assert np.bincount(splits.eval.labels).tolist() == [6, 6]
    assert isinstance(splits.eval, IndexedImages)
    names = sorted(splits.eval.name(index).replace("-copy", "") for index in range(12))
    assert names[::2] == names[1::2]


def test_classes_of_a_single_image_and_its_copies_cannot_be_divided(photos: Path) -> None:
    for name in ("cat", "dog"):
        first, *others = sorted((photos / "train" / name).glob("*.png"))
        for path in others:
            path.write_bytes(first.read_bytes())
    with raises(RequestError, match="no images can be held out, because each has a copy that is needed for training"):
        load_splits(DataConfig(dataset=str(photos / "train")))


def test_training_leaves_excluded_images_out_and_records_the_name_of_the_list(
    problems: Path, tmp_path: Path, command: Command
) -> None:
    written = tmp_path / "exclude.txt"
    command("check", problems, "--write-exclude", written)
    words = [*TINY, "--dataset", problems, "--max-steps", 1, "--image-size", 32, "--batch-size", 8]
    code, _, err = command("train", *words, "--exclude", written, "--output-dir", tmp_path / "run")
    assert code == 0, err
    record = RunRecord.load(tmp_path / "run/record.json")
    assert (record.dataset.train_counts, record.dataset.eval_counts) == ([10, 12], [13, 12])
    assert record.unreadable_images == []
    assert record.config["exclude"] == "exclude.txt"
    assert "--exclude exclude.txt" in record.command
    code, _, err = command("train", *words, "--output-dir", tmp_path / "run")
    assert code == 2
    assert "the images of photos have changed" in err


def header(digest: str | None) -> str:
    return json.dumps({"dataset": digest})


@mark.parametrize(
    ("lines", "words"),
    [
        (['["train", 24, "x", ""]'], "lists row 24 of train, which has 24 rows"),
        (['["train", -1, "x", ""]'], "lists row -1 of train; expected a row number of 0 or more"),
        (
            ['["test", 0, "x", ""]'],
            "was made for a different dataset, or a different version of this one (it lists images of test)",
        ),
        (['["train", 0]'], "is not a list written by resnext-hub check --write-exclude"),
        (["train 0 x"], "is not a list written by resnext-hub check --write-exclude"),
        ([f'["train", {row}, "x", ""]' for row in range(24)], "lists all images of train"),
    ],
)
def test_a_list_that_does_not_fit_the_dataset_is_refused(
    lines: list[str], words: str, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "exclude.txt"
    digest = load_splits(DataConfig(dataset=str(photos))).source_digest
    path.write_text("\n".join([header(digest), *lines]))
    with raises(RequestError) as raised:
        load_splits(DataConfig(dataset=str(photos), exclude=str(path)))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b"[]", None])
def test_a_file_that_is_not_a_list_is_refused(content: bytes | None, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    if content is not None:
        path.write_bytes(content)
    with raises(RequestError, match=r"is not a list written by|cannot be read: No such file"):
        load_splits(DataConfig(dataset=str(photos), exclude=str(path)))


def test_a_list_of_another_dataset_is_refused(photos: Path, tmp_path: Path, command: Command) -> None:
    (photos / "train" / "cat" / "broken.png").write_bytes(b"no image")
    assert command("check", photos, "--write-exclude", tmp_path / "exclude.txt")[0] == 1
    with raises(RequestError, match="was made for a different dataset, or a different version of this one"):
        load_splits(DataConfig(exclude=str(tmp_path / "exclude.txt")))


def test_a_split_that_cannot_be_evaluated_is_not_checked(photos: Path, command: Command) -> None:
    (photos / "test/bird").mkdir(parents=True)
    (photos / "test/bird/1.png").write_bytes((photos / "train/cat/00.png").read_bytes())
    code, out, err = command("check", photos)
    assert code == 0
    assert out.startswith("class  train  val\n")
    assert "the test split is not checked: no class of the evaluation split (bird) is in the training split" in err
    (photos / "test/cat").mkdir()
    (photos / "test/cat/1.png").write_bytes((photos / "train/cat/00.png").read_bytes())
    code, out, _ = command("check", photos)
    assert code == 1
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert rows == [["bird", "0", "0", "1"], ["cat", "12", "12", "1"], ["dog", "12", "12", "0"]]


def test_thousands_of_identical_images_are_one_group(tmp_path: Path, patches: list[Image.Image]) -> None:
    for index in range(3000):
        path = tmp_path / f"{'ab'[index % 2]}/{index}.png"
        path.parent.mkdir(exist_ok=True)
        if index < 2:
            patches[index].save(path)
        else:
            path.symlink_to(tmp_path / f"{'ab'[index % 2]}/{index % 2}.png")
    assert sorted(len(group.images) for group in checked(tmp_path).groups) == [1500, 1500]


def test_a_grid_shows_the_worst_duplicates(photos: Path, tmp_path: Path, command: Command) -> None:
    (photos / "val/cat/leak.png").write_bytes((photos / "train/cat/00.png").read_bytes())
    command("check", photos, "--grid", tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert grid.shape[1] > grid.shape[0] > 100
    assert grid.std() > 20


def test_a_stream_is_refused() -> None:
    with raises(RequestError, match=r"^streaming=True: a stream cannot be checked; omit this setting$"):
        survey(DataConfig(streaming=True))


@mark.parametrize("share", [1.0, 0.5, 0.0])
@mark.parametrize("count", [2, 50, 700])
def test_the_search_finds_every_close_pair_of_hashes_with_a_detailed_image(count: int, share: float) -> None:
    generator = np.random.default_rng(count)
    hashes = generator.integers(0, 1 << 63, (count, 2), dtype=np.uint64)
    for index in range(0, count - 1, 2):  # neighbors differ in 0 to 15 bits, plain or mirrored
        bits = generator.choice(64, index // 2 % 16, replace=False)
        flips = np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
        hashes[index + 1, index // 2 % 2] = hashes[index, 0] ^ flips
    detailed = generator.random(count) < share
    found = {
        (int(i), int(j), mirrored)
        for first, second, mirrored in _close(hashes, detailed)
        for i, j in zip(first, second, strict=True)
    }
    distances = {m: np.bitwise_count(hashes[:, :1] ^ hashes[None, :, int(m)]) for m in (False, True)}
    expected = {
        (i, j, m)
        for m, d in distances.items()
        for i in range(count)
        for j in range(count)
        if d[i, j] <= MAX_DISTANCE and i != j and detailed[i] and (i < j or not detailed[j])
    }
    assert found == expected
    assert expected or share < 1


def test_small_images_are_compared_where_they_are_few() -> None:
    def examined(*sides: int) -> Examined:
        images = tuple(
            Facts(split="train", index=i, row=i, name=str(i), labels=(0,), size=(side, side))
            for i, side in enumerate(sides)
        )
        return Examined(images=images, hashes=np.zeros((len(sides), 2), np.uint64), thumbnails=np.zeros(0))

    assert examined(200, 20, 31, 100).detailed.tolist() == [True] * 4
    assert examined(28, 28, 28, 100).detailed.tolist() == [False, False, False, True]
    assert examined(32, 32).detailed.tolist() == [True, True]


def test_a_blank_dataset_has_no_near_duplicates(tmp_path: Path) -> None:
    for index in range(8):
        path = tmp_path / f"{'ab'[index % 2]}/{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 30 * index).save(path)
    assert near_duplicates(survey(DataConfig(dataset=str(tmp_path)))) == []
