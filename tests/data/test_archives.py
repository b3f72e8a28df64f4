"""Zip and tar archives open as the folder that they contain; hostile ones write nothing outside of it."""

import gzip
import io
import os
import stat
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

from pytest import LogCaptureFixture, MonkeyPatch, fixture, mark, raises
from support.layouts import add, folders, image, shards, tarred, zipped

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources import archives, limits, open_source
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, RunError


@fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/unpacked"


def load(path: Path, **settings: object) -> Splits:
    # the images of these tests are copies of each other
    return load_splits(DataConfig(dataset=str(path), **{"group_duplicates": False, **settings}))


def refused(path: Path, **settings: object) -> str:
    with raises(RequestError) as raised:
        load(path, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def unpacked(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_an_archive_is_the_same_dataset_as_its_folder(tmp_path: Path) -> None:
    path = zipped(folders)(tmp_path / "a")
    packed, folder = load(path), load(tmp_path / "a/content")
    assert packed.fingerprint == folder.fingerprint
    assert packed.dataset_id == "photos.zip"
    assert packed.found.dataset == str(path)


def test_an_archive_is_unpacked_once_and_again_if_it_changes(tmp_path: Path, cache: Path) -> None:
    path = zipped(folders)(tmp_path / "a")
    load(path)
    before = {name: os.stat(cache / name).st_mtime_ns for name in unpacked(cache) if name.endswith(".jpg")}
    load(path)
    assert {name: os.stat(cache / name).st_mtime_ns for name in before} == before
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("truck/1.jpg", image(90))
        archive.writestr("truck/2.jpg", image(91))
    assert load(path).label_names == ("bus", "car", "truck")


def test_system_files_and_hidden_files_are_not_unpacked(tmp_path: Path, cache: Path) -> None:
    load(zipped(folders, top="photos/")(tmp_path / "a"))
    assert not [name for name in unpacked(cache) if "MACOSX" in name or "DS_Store" in name or "/._" in name]


def test_links_to_files_of_the_archive_are_copied_and_others_are_left_out(tmp_path: Path, cache: Path) -> None:
    path = tarred(folders, ".tar")(tmp_path / "a")
    (tmp_path / "secret.jpg").write_bytes(image(77))
    with tarfile.open(path, "a") as archive:
        for name, target, kind in (
            ("car/hard.jpg", "bus/000.jpg", tarfile.LNKTYPE),
            ("car/soft.jpg", "../bus/001.jpg", tarfile.SYMTYPE),
            ("car/out.jpg", "../../../../secret.jpg", tarfile.SYMTYPE),
            ("car/absolute.jpg", str(tmp_path / "secret.jpg"), tarfile.SYMTYPE),
            ("bus/fifo.jpg", "", tarfile.FIFOTYPE),
            ("bus/device.jpg", "", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    load(path)
    names = {Path(name).name for name in unpacked(cache)}
    assert {"hard.jpg", "soft.jpg"} <= names
    assert names.isdisjoint({"out.jpg", "absolute.jpg", "fifo.jpg", "device.jpg"})
    (hard,) = cache.rglob("hard.jpg")
    assert hard.read_bytes() == image(0)
    assert not hard.is_symlink()


def raw_zip(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), image(1))
    return path


def raw_tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            add(archive, name, image(1))
    return path


@mark.parametrize("write", [raw_zip, raw_tar])
@mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"])
def test_a_path_that_leads_outside_is_refused_and_nothing_is_written(
    name: str, write: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / f"deep/photos{'.zip' if write is raw_zip else '.tar'}", "cat/1.jpg", name)
    assert "leads outside the archive" in refused(path)
    assert not list(tmp_path.rglob("evil.jpg"))
    assert not [name for name in unpacked(cache) if ".partial" not in name and name.endswith(".jpg")]


def zip_of(size: int, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.bmp", bytes(size))
    return path


def tar_of(size: int, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "cat/1.bmp", bytes(size))
    return path


@mark.parametrize(("write", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar.gz")])
def test_a_decompression_bomb_is_refused_before_it_fills_the_disk(
    write: Callable[[int, Path], Path], name: str, tmp_path: Path, cache: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SPARE_BYTES", 1 << 20)
    path = write(1 << 25, tmp_path / name)
    assert "may be a decompression bomb" in refused(path)
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 1 << 24


def bomb_of_skipped_files(path: Path) -> None:
    """Files of 4 MB that no dataset has, and hidden ones."""
    with tarfile.open(path, "w:gz") as archive:
        for number in range(8):
            add(archive, f"{'.' * (number % 2)}{number}", bytes(1 << 22))


def bomb_of_headers(path: Path) -> None:
    """Links of a few bytes with names of half a megabyte each."""
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for number in range(64):
            info = tarfile.TarInfo(f".{number}/{'x' * (1 << 19)}")
            info.type = tarfile.SYMTYPE
            archive.addfile(info)


def bomb_of_one_header(path: Path) -> None:
    """A file with 32 extended headers of a megabyte."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 20
    with gzip.open(path, "wb") as file:
        for _ in range(32):
            file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
        file.write(tarfile.TarInfo("cat/1.bmp").tobuf() + bytes(tarfile.RECORDSIZE))


def bomb_beside_a_sample(path: Path) -> None:
    """A WebDataset shard with a large file that is not part of a sample."""
    with tarfile.open(path, "w:gz") as archive:
        for number in range(4):
            add(archive, f"{number}.jpg", image(number))
            add(archive, f"{number}.cls", str(number % 2).encode())
        add(archive, ".x", bytes(1 << 25))


@mark.parametrize(
    ("write", "words"),
    [
        (bomb_of_skipped_files, "may be a decompression bomb"),
        (bomb_of_headers, "may be a decompression bomb"),
        (bomb_of_one_header, "the headers of one of its files have more than 4194304 bytes"),
        (bomb_beside_a_sample, "may be a decompression bomb"),
    ],
)
def test_skipped_files_and_headers_count_toward_the_limit_of_a_bomb(
    write: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SPARE_BYTES", 1 << 20)
    write(tmp_path / "a.tar.gz")
    tracemalloc.start()
    error = refused(tmp_path / "a.tar.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in error
    assert peak < 1 << 24


@mark.parametrize("write", [zipped(folders), tarred(folders, ".tar"), tarred(folders, ".tar.gz")])
def test_a_changed_archive_is_unpacked_again_though_its_size_and_times_are_the_same(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    path = write(tmp_path / "a")
    stat_of = os.fstat(os.open(path, os.O_RDONLY))
    monkeypatch.setattr(os, "fstat", lambda descriptor: stat_of)  # a file system without change times
    before = archives._version_of(path)
    assert archives._version_of(path) == before
    content = bytearray(path.read_bytes())
    for place in (3, len(content) // 2, len(content) - 3):
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert archives._version_of(path) != before


def test_the_version_of_a_large_archive_depends_on_the_directory_of_a_zip_but_reads_little(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60_000):  # a directory of 5 MB
            archive.writestr(zipfile.ZipInfo(f"{'long' * 10}/{number}"), b"")
    with open(path, "rb") as file:
        size = path.stat().st_size
        start, length = archives._zip_directory(file, size)
        file.seek(start)
        assert file.read(4) == b"PK\x01\x02"
        assert 4 << 20 < length < size
        assert start + length == size - 22
        assert archives._zip_directory(file, 100) == (0, 0)


def test_a_zip_that_understates_its_size_is_refused(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    path = zip_of(1 << 25, tmp_path / "a.zip")
    content = path.read_bytes()
    path.write_bytes(content.replace((1 << 25).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    monkeypatch.setattr(limits, "SPARE_BYTES", 1 << 20)
    assert "cannot be unpacked" in refused(path)


@mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", b"", "File is not a zip file"),
        ("a.zip", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        ("a.tar", b"not a tar file", "cannot be unpacked"),
        ("a.tar.gz", b"\x1f\x8b\x08\x00damaged", "cannot be unpacked"),
        ("a.tar.xz", b"\xfd7zXZ\x00damaged", "cannot be unpacked"),
        ("a.7z", b"7z", "is neither a zip nor a tar file; unpack it and use the folder"),
    ],
)
def test_a_damaged_archive_raises_an_error_of_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)


def test_damage_anywhere_in_a_tar_file_is_an_error(tmp_path: Path) -> None:
    path = tarred(folders, ".tar")(tmp_path / "a")
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive]
    for damaged in (
        content[: offsets[6]],  # ends where a header should be
        content[: offsets[6] + 100],
        content[: offsets[6]] + b"x" + content[offsets[6] + 1 :],
        content + content,
    ):
        path.write_bytes(damaged)
        assert "cannot be unpacked" in refused(path)


def test_an_unpacked_folder_that_lost_a_file_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    path = zipped(folders)(tmp_path / "a")
    before = load(path)
    next(cache.rglob("car/*.jpg")).unlink()
    assert load(path).fingerprint == before.fingerprint


def test_links_to_folders_and_links_in_zip_files_are_followed(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    path = tarred(folders, ".tar")(tmp_path / "a")
    with tarfile.open(path, "a") as archive:
        for name, target in (("train", "all"), ("all/bus", "../bus"), ("all/car", "../car"), ("loop", "loop")):
            info = tarfile.TarInfo(f"set/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, target if "/" not in name else f"../{target}"
            archive.addfile(info)
    unpacked = archives.unpack(path)
    assert len(list((unpacked / "set/all/bus").iterdir())) == 6
    assert len(list((unpacked / "set/train/car").iterdir())) == 6
    assert "ignored 1 links whose targets are not in the archive, such as set/loop" in caplog.text
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        packed.writestr("cat/1.jpg", image(1))
        link = zipfile.ZipInfo("dog/1.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "../cat/1.jpg")
    assert (archives.unpack(tmp_path / "b.zip") / "dog/1.jpg").read_bytes() == image(1)


def test_a_truncated_archive_leaves_no_folder_behind(tmp_path: Path, cache: Path) -> None:
    for suffix in (".zip", ".tar", ".tar.gz"):
        write = zipped(folders) if suffix == ".zip" else tarred(folders, suffix)
        path = write(tmp_path / suffix)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "cannot be unpacked" in refused(path)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_an_encrypted_zip_is_refused_by_name(tmp_path: Path) -> None:
    path = zipped(folders)(tmp_path / "a")
    content = bytearray(path.read_bytes())
    for mark_, flag in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):  # the flag for encryption in each header
        at = -1
        while (at := content.find(mark_, at + 1)) >= 0:
            content[at + flag] |= 1
    path.write_bytes(content)
    assert "encrypted" in refused(path)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    assert "has the same name as a file" in refused(raw_tar(tmp_path / "a.tar", "cat", "cat/1.jpg"))
    assert "has the same name as a folder" in refused(raw_tar(tmp_path / "b.tar", "cat/1.jpg", "cat"))


def test_permissions_in_an_archive_have_no_effect(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
            info = tarfile.TarInfo(name)
            content = image(1)
            info.size, info.mode, info.uid = len(content), 0o4000, 12345
            archive.addfile(info, io.BytesIO(content))
    load(path)
    (found,) = cache.rglob("cat/1.jpg")
    assert stat.S_IMODE(found.stat().st_mode) & 0o7000 == 0
    assert found.stat().st_uid == os.getuid()


def test_processes_that_open_an_archive_together_unpack_it_once(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    path = zipped(folders)(tmp_path / "a")
    caplog.set_level("INFO")
    threads = [threading.Thread(target=archives.unpack, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.text.count("unpacking") == 1


def test_a_cache_that_is_not_writable_raises_a_run_error(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "file"))
    with raises(RunError, match="set RESNEXT_HUB_CACHE to a folder with enough space"):
        load(zipped(folders)(tmp_path / "a"))


# WebDataset


def test_a_tar_file_of_class_folders_is_not_taken_for_a_shard(tmp_path: Path) -> None:
    assert load(tarred(folders, ".tar")(tmp_path / "a")).label_names == ("bus", "car")


def test_a_stream_of_shards_has_the_samples_of_the_shards(tmp_path: Path) -> None:
    path = shards("train-0.tar", "train-1.tar", "val-0.tar")(tmp_path / "a")
    streamed = load(path, streaming=True)
    assert (len(streamed.train.shards), streamed.train.count, streamed.eval.count) == (2, 24, 12)
    indexed = load(path)
    records = list(streamed.train.records())
    assert [record.label for record in records] == list(indexed.train.labels)
    assert [record.row["bytes"] for record in records] == [indexed.train.row(i)["bytes"] for i in range(24)]
    assert [record.index for record in streamed.train.records(7, 15)] == list(range(7, 15))


def test_compressed_shards_are_streamed_in_order(tmp_path: Path) -> None:
    path = shards("train-0.tar", "val-0.tar")(tmp_path / "a")
    whole = list(load(path, streaming=True).train.records())
    (path / "train-0.tar.gz").write_bytes(gzip.compress((path / "train-0.tar").read_bytes()))
    (path / "train-0.tar").unlink()
    streamed = load(path, streaming=True).train
    assert [groups.tolist() for groups in streamed.groups] == [[12]]  # read as a whole
    for found, record in zip(streamed.records(5, 12), whole[5:], strict=True):
        assert (found.index, found.label, found.row["bytes"]) == (record.index, record.label, record.row["bytes"])


def test_a_shard_that_changes_during_a_run_ends_it(tmp_path: Path) -> None:
    path = shards("train-0.tar", "val-0.tar")(tmp_path / "a")
    streamed = load(path, streaming=True).train
    with open(path / "train-0.tar", "ab") as file:
        file.write(bytes(512))
    with raises(RunError, match=r"the stream was interrupted in shard 0 \(it has changed\)"):
        list(streamed.records())


def shard(path: Path, *files: tuple[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            add(archive, name, content.encode() if isinstance(content, str) else content)
    return path


GOOD = (("0.jpg", image(0)), ("0.cls", "0"), ("1.png", image(1)), ("1.cls", "1\n"))


def test_samples_may_have_images_of_different_formats_and_other_files(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar", *GOOD, ("2.cls", "1"), ("2.txt", "a caption"), ("2.seg.npy", b"x"), ("2.webp", b"?")
    )
    rows = open_source(DataConfig(dataset=str(path))).tables["train"]
    found = [(Path(row["image"]["path"]).name, row["cls"]) for row in rows]
    assert found == [("0.jpg", 0), ("1.png", 1), ("2.webp", 1)]


@mark.parametrize(
    ("files", "words"),
    [
        ([("2.jpg", image(2))], "the sample 2 has no label, such as 2.cls"),
        ([("2.cls", "0")], "the sample 2 has no image (it has cls)"),
        ([("2.jpg", image(2)), ("2.png", image(2)), ("2.cls", "0")], "the sample 2 has several images (jpg, png)"),
        ([("2.jpg", image(2)), ("2.cls", "")], "2.cls is empty"),
        ([("2.jpg", image(2)), ("2.cls", "dog")], "numbers in some samples and names in others (0, dog)"),
        ([("2.jpg", image(2)), ("2.json", '{"width": 3}')], "2.json has no class (keys: width); choose the key with"),
        ([("2.jpg", image(2)), ("2.json", "[1]")], "2.json has no class (not an object)"),
        ([("2.jpg", image(2)), ("2.json", "{")], "cannot be read"),
        ([("2.jpg", image(2)), ("2.cls", "\udcff".encode("utf-8", "surrogateescape"))], "cannot be read"),
        ([("2.jpg", image(2)), ("2.jpg", image(3)), ("2.cls", "0")], "contains 2.jpg twice"),
        ([("2.jpg", image(2)), ("2.cls", "0" * (1 << 21))], "2.cls is too large (2,097,152 bytes)"),
    ],
)
def test_a_sample_without_one_image_and_one_class_is_refused_by_name(
    files: list[tuple[str, bytes | str]], words: str, tmp_path: Path
) -> None:
    assert words in refused(shard(tmp_path / "a.tar", *GOOD, *files))


def test_a_key_of_the_json_labels_can_be_chosen(tmp_path: Path) -> None:
    samples = [(f"{i}.jpg", image(i)) for i in range(6)]
    labels = [(f"{i}.json", f'{{"kind": "k{i % 2}", "label": "l{i % 3}"}}') for i in range(6)]
    path = shard(tmp_path / "a.tar", *(file for pair in zip(samples, labels, strict=True) for file in pair))
    assert load(path).label_names == ("l0", "l1", "l2")
    assert load(path, label_column="kind").label_names == ("k0", "k1")
    assert "has no class under the key none" in refused(path, label_column="none")


@mark.parametrize("names", ["bus\n", "bus\nbus\n", "bus\n\ncar\n", b"\xff\xfe"])
def test_a_file_of_class_names_that_does_not_fit_is_refused(names: str | bytes, tmp_path: Path) -> None:
    path = shards("a.tar", names="x")(tmp_path / "a")
    (path / "classes.txt").write_bytes(names.encode() if isinstance(names, str) else names)
    assert "classes.txt" in refused(path)


def test_a_dataset_of_shards_is_reopened_with_its_recorded_settings(tmp_path: Path) -> None:
    for number, kind in enumerate(("cls", "json")):
        found = load(shards("train-0.tar", "val-0.tar", kind=kind)(tmp_path / str(number)))
        again = load_splits(found.found)
        assert (again.label_names, again.fingerprint) == (found.label_names, found.fingerprint)


def test_labels_in_different_places_require_a_decision(tmp_path: Path) -> None:
    files = [("2.jpg", image(2)), ("2.json", '{"label": 1}'), ("3.jpg", image(3)), ("3.json", '{"label": 0}')]
    path = shard(tmp_path / "a.tar", *GOOD, *files)
    assert "have their labels in different places (cls, label); choose one with label_column" in refused(path)


def test_an_image_has_the_bytes_in_the_shard_even_if_a_file_of_its_name_exists(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.jpg").write_bytes(b"another file")
    rows = open_source(DataConfig(dataset=str(shard(tmp_path / "a.tar", *GOOD)))).tables["train"]
    assert [row["image"]["bytes"] for row in rows] == [image(0), image(1)]


def test_shards_with_leading_dots_and_special_files_are_handled(tmp_path: Path) -> None:
    dotted = shard(tmp_path / "a.tar", *((f"./{name}", content) for name, content in GOOD))
    assert open_source(DataConfig(dataset=str(dotted))).tables["train"].num_rows == 2
    os.mkfifo(tmp_path / "b.tar")
    assert "neither a folder nor a regular file" in refused(tmp_path / "b.tar")
    deep = shard(tmp_path / "c.tar", *GOOD[:2], ("1.jpg", image(1)), ("1.json", "[" * 99999))
    assert "nested too deeply" in refused(deep)
    assert "has the negative class -1" in refused(
        shard(tmp_path / "d.tar", *GOOD[:2], ("1.jpg", image(1)), ("1.json", '{"label": -1}'))
    )


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = shards("a.tar")(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:9000])
    assert "a.tar cannot be read" in refused(path)


def test_shards_are_listed_for_the_fingerprint(tmp_path: Path) -> None:
    path = shards("train-0.tar", "val-0.tar")(tmp_path / "a")
    assert [name for name, _ in open_source(DataConfig(dataset=str(path))).files] == ["train-0.tar", "val-0.tar"]
