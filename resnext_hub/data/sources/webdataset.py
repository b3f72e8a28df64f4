"""WebDataset shards: tar files in which the image `x.jpg` is beside its label, `x.cls` or `x.json`.

A `.cls` file contains a number or a name; a `.json` file an object with a key such as `label`. Numbers are the names of
their classes, unless a `classes.txt` beside the shards names them, one per line.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.data.sources.names import LABEL_NAMES
from resnext_hub.data.sources.parquet import check_cache, pointer_reason, quiet_library, require_space
from resnext_hub.data.sources.shards import splits_of
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.streamed import StreamedTable
from resnext_hub.data.sources.tar_files import headers, open_tar
from resnext_hub.data.sources.tar_shards import TarShard, is_compressed, version_of
from resnext_hub.data.sources.walk import ignored, is_hidden, is_image
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.files import read_regular
from resnext_hub.text import listing, printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

SHARDS = (".tar", ".tar.gz", ".tgz")
"""Suffixes of shards."""

CLASSES = "classes.txt"
"""File that names the classes, one per line, in the order of their numbers."""

_LABELS = ("cls", "json")
_FIRST = 64
"""Files at the beginning of a shard that show whether it is one."""

_LABEL_BYTES = 1 << 20
"""Largest label file."""

_IMAGE_BYTES = 8 * MAX_IMAGE_PIXELS + (1 << 26)
"""Largest image: four channels of 16 bits, and metadata."""

_CLASSES_BYTES = 1 << 24

_FORMAT = 2
"""Version of the rows in the cache of datasets; increment it when their content changes."""


class WebDatasetShards:
    """One or more WebDataset shards."""

    def matches(self, request: "Request") -> bool:
        """Return whether the requested file, or the files of the requested folder, are shards."""
        return bool(request.webdataset)

    def open(self, request: "Request") -> OpenDataset:
        """Open the shards; with streaming, they are read in place, else copied to the cache of datasets."""
        config = request.config
        assert request.path is not None
        root = request.path if request.is_folder else request.path.parent
        splits = splits_of(root, request.webdataset)
        scans = {file: _scan(root / file, config.label_column) for files in splits.values() for file in files}
        found = {file: scan.labels for file, scan in scans.items()}
        column = _column(root, {source for scan in scans.values() for source in scan.sources})
        numbers, names = _classes(root, [label for labels in found.values() for label in labels])
        tables: dict[str, Any] = {
            split: _in_place(root, {file: scans[file] for file in files}, column, numbers, names)
            if config.streaming
            else _copied(root, files, found, column, numbers, names)
            for split, files in splits.items()
        }
        notes = ignored(request.tree, [*request.webdataset, CLASSES]) if request.is_folder else []
        return OpenDataset(
            tables=tables,
            files=tuple((file, (root / file).stat().st_size) for file in found),
            stated={split: sum(len(found[file]) for file in files) for split, files in splits.items()},
            notes=(f"{len(found)} WebDataset {'shard' if len(found) == 1 else 'shards'}", *notes),
        )


def find_shards(root: Path, files: Sequence[str]) -> list[str]:
    """Return the WebDataset shards among files, or none if the first tar file is an ordinary archive.

    Args:
        root: Their folder.
        files: Their paths relative to it.
    """
    shards = [file for file in files if file.lower().endswith(SHARDS)]
    return shards if shards and _has_samples(root / shards[0]) else []


def _has_samples(path: Path) -> bool:
    """Return whether an image at the beginning of a tar file has a label beside it."""
    kinds: dict[str, set[str]] = {}
    try:
        with open_tar(path) as archive:
            for member in islice(headers(archive), _FIRST):
                key, kind = _split(member.name)
                if member.isfile() and kind:
                    kinds.setdefault(key, set()).add(kind)
    except (OSError, ValueError):  # damaged: what was read so far decides
        pass
    return any(not found.isdisjoint(_LABELS) and any(is_image(f".{k}") for k in found) for found in kinds.values())


def _split(name: str) -> tuple[str, str]:
    """Return the key of a file in a shard, which is its path up to the first dot of its name, and the rest."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or any(map(is_hidden, parts)):
        return "", ""
    stem, _, kind = parts[-1].partition(".")
    return "/".join([*parts[:-1], stem]), kind.lower()


class _Sample(NamedTuple):
    """The files of a sample by the rest of their names; only labels and, if wanted, images have their content."""

    key: str
    fields: dict[str, bytes]
    places: dict[str, tuple[int, int]]
    """Offset and size of each file; the offset of a sparse one is -1, since it is not stored as a whole."""


def _samples(path: Path, images: bool) -> Iterator[_Sample]:
    """Yield each sample.

    Raises:
        ValueError: If the shard is damaged, or contains a file twice or one that is too large.
    """
    sample = _Sample("", {}, {})
    with open_tar(path) as archive:
        for member in headers(archive):
            name, kind = _split(member.name)
            if not member.isfile() or not kind:
                continue
            if name != sample.key:
                if sample.fields:
                    yield sample
                sample = _Sample(name, {}, {})
            if kind in sample.fields:
                raise ValueError(f"it contains {printable(member.name)} twice")
            sample.fields[kind] = b""
            sample.places[kind] = (-1 if member.issparse() else member.offset_data, member.size)
            wanted = kind in _LABELS or (images and is_image(f".{kind}"))
            if member.size > (_LABEL_BYTES if kind in _LABELS else _IMAGE_BYTES) and wanted:
                raise ValueError(f"{printable(member.name)} is too large ({member.size:,} bytes)")
            if wanted and (content := archive.extractfile(member)) is not None:
                sample.fields[kind] = content.read()
    if sample.fields:
        yield sample


@dataclass(frozen=True)
class _Scan:
    """What is known of a shard without reading its images."""

    labels: list[int | str]
    sources: set[str]
    """The places that the labels come from."""
    names: list[str]
    """Name of each image."""
    places: list[tuple[int, int]]
    """Its offset and size."""


def _scan(path: Path, label_key: str | None) -> _Scan:
    """List the samples of a shard without reading its images.

    Raises:
        RequestError: If the shard is damaged, or a sample has no image or no label.
    """
    scan = _Scan([], set(), [], [])
    try:
        for key, fields, places in _samples(path, images=False):
            kind = _image_of(key, fields)
            label, source = _label_of(key, fields, label_key)
            scan.labels.append(label)
            scan.sources.add(source)
            scan.names.append(f"{key}.{kind}")
            scan.places.append(places[kind])
    except (OSError, ValueError) as error:
        reason = pointer_reason(path) if path.is_file() else None
        raise RequestError(
            f"the WebDataset shard {printable(path)} cannot be read: {reason or one_line(error)}"
        ) from error
    if not scan.labels:
        raise RequestError(f"the WebDataset shard {printable(path)} contains no samples")
    return scan


def _image_of(key: str, fields: Mapping[str, bytes]) -> str:
    """Return the name of the field with the image of a sample."""
    images = [kind for kind in fields if is_image(f".{kind}")]
    if len(images) != 1:
        what = f"several images ({listing(images)})" if images else f"no image (it has {listing(fields)})"
        raise ValueError(f"the sample {printable(key)} has {what}")
    return images[0]


def _label_of(key: str, fields: Mapping[str, bytes], label_key: str | None) -> tuple[int | str, str]:
    """Return the label of a sample, a number or a name, and where it is: `cls`, or the key in the `.json` file."""
    if "cls" in fields and label_key in (None, "cls"):
        text = fields["cls"].decode().strip()
        if not text:
            raise ValueError(f"{printable(key)}.cls is empty")
        return (int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else text), "cls"
    if "json" not in fields:
        raise ValueError(f"the sample {printable(key)} has no label, such as {printable(key)}.cls")
    try:
        facts = json.loads(fields["json"])
    except RecursionError as error:
        raise ValueError(f"{printable(key)}.json is nested too deeply") from error
    names = [label_key] if label_key else [n for n in LABEL_NAMES if isinstance(facts, dict) and n in facts]
    label = facts.get(names[0]) if names and isinstance(facts, dict) else None
    if isinstance(label, list):
        raise ValueError(
            f"{printable(key)}.json has a list of labels; several labels per image are not supported in WebDataset "
            "shards, but they are in parquet files and tables"
        )
    if not isinstance(label, (int, str)) or isinstance(label, bool) or label == "":
        shown = f"keys: {listing(facts, 6)}" if isinstance(facts, dict) else "not an object"
        wanted = f"no class under the key {printable(label_key)}" if label_key else "no class"
        raise ValueError(f"{printable(key)}.json has {wanted} ({shown}); choose the key with {setting('label_column')}")
    if isinstance(label, int) and label < 0:
        raise ValueError(f"{printable(key)}.json has the negative class {label}")
    return label, names[0]


def _column(root: Path, sources: set[str]) -> str:
    """Return the place that all labels come from, which names the column, so that it can be requested again.

    Raises:
        RequestError: If there are several.
    """
    if len(sources) > 1:
        raise RequestError(
            f"the samples of {printable(root)} have their labels in different places ({listing(sorted(sources))}); "
            f"choose one with {setting('label_column')}"
        )
    return next(iter(sources))


def _classes(root: Path, labels: Sequence[int | str]) -> tuple[dict[int | str, int], list[str]]:
    """Return the number of each label, and the names of the classes.

    Raises:
        RequestError: If labels are numbers in some samples and names in others, or `classes.txt` does not fit.
    """
    found = set(labels)
    kinds = {type(label) for label in found}
    if len(kinds) > 1:
        examples = [next(label for label in found if isinstance(label, kind)) for kind in (int, str)]
        raise RequestError(
            f"the labels of {printable(root)} are numbers in some samples and names in others ({listing(examples)}); "
            "use only numbers or only names"
        )
    path = root / CLASSES
    if not os.path.lexists(path) or kinds != {int}:
        ordered = sorted(found, key=lambda label: (isinstance(label, str), label))
        return {label: i for i, label in enumerate(ordered)}, [str(label) for label in ordered]
    try:
        names = read_regular(path, limit=_CLASSES_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{printable(path)} cannot be read: {one_line(error)}") from error
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    numbers = sorted(label for label in found if isinstance(label, int))
    if numbers[-1] >= len(names) or not all(names) or len(set(names)) < len(names):
        raise RequestError(
            f"{printable(path)} has {len(set(names))} different names in {len(names)} lines, but the labels go up to "
            f"{numbers[-1]}; expected the name of each class on a line of its own"
        )
    return {i: i for i in range(len(names))}, names


def _features(column: str, names: Sequence[str]) -> "datasets.Features":
    import datasets

    label = datasets.ClassLabel(names=list(names))
    return datasets.Features({"image": datasets.Image(decode=False), column: label})


def _in_place(
    root: Path, scans: Mapping[str, _Scan], column: str, numbers: Mapping[int | str, int], names: Sequence[str]
) -> StreamedTable:
    """Return shards as a table that is read in place."""
    import pyarrow

    shards = []
    for file, scan in scans.items():
        path = root / file
        in_order = is_compressed(path) or min(scan.places)[0] < 0
        encoded = [name.encode(errors="surrogateescape") for name in scan.names]
        shards.append(
            TarShard(
                path=path,
                version=version_of(path),
                names=pyarrow.array(encoded, pyarrow.binary()),
                labels=np.array([numbers[label] for label in scan.labels]),
                places=None if in_order else np.array(scan.places),
                contents=_contents,
            )
        )
    return StreamedTable(dict(_features(column, names)), tuple(shards))


def _contents(path: Path) -> Iterator[bytes]:
    """Yield the images of a shard in order."""
    for key, fields, _ in _samples(path, images=True):
        yield fields[_image_of(key, fields)]


def _copied(
    root: Path,
    files: Sequence[str],
    labels: Mapping[str, Sequence[int | str]],
    column: str,
    numbers: Mapping[int | str, int],
    names: Sequence[str],
) -> "datasets.Dataset":
    """Copy shards to the cache of datasets, unless this version of them is there, and return the table."""
    import datasets

    places = [root / file for file in files]
    arguments = {
        "paths": [str(place) for place in places],
        "column": column,
        "numbers": dict(numbers),
        # labels as well, because some file systems keep the time of a file that is replaced; a tuple, because lists are
        # split into shards
        "versions": (_FORMAT, *map(version_of, places), *(_digest(labels[file]) for file in files)),
    }
    check_cache()
    try:
        with quiet_library():
            return datasets.Dataset.from_generator(_rows, features=_features(column, names), gen_kwargs=arguments)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        require_space(cause)
        raise RequestError(f"the WebDataset shards in {printable(root)} cannot be read: {one_line(cause)}") from error


def _rows(
    paths: Sequence[str],
    column: str,
    numbers: Mapping[int | str, int],
    versions: Sequence[object] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the rows of shards; `versions` only identifies their content in the cache of datasets."""
    for path in paths:
        for key, fields, _ in _samples(Path(path), images=True):
            kind = _image_of(key, fields)
            label, _ = _label_of(key, fields, column)
            if label not in numbers:
                raise ValueError(f"{printable(path)} has changed: the class {printable(label)} is new")
            # a path below a file exists nowhere, so datasets cannot mistake it for that of an image
            yield {"image": {"bytes": fields[kind], "path": f"{path}/{key}.{kind}"}, column: numbers[label]}


def _digest(labels: Sequence[int | str]) -> str:
    """Return a digest of labels."""
    return hashlib.sha256(json.dumps(labels).encode(errors="surrogatepass")).hexdigest()
