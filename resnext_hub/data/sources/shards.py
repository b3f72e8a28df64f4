"""Group parquet files into configurations and splits, and read columns that are encoded in folder names."""

import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from resnext_hub.data.sources.names import split_keyword
from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.files import read_regular
from resnext_hub.text import listing, printable
from resnext_hub.yaml_files import YAML_BYTES, parse_yaml

_README_BYTES = 1 << 24
_SPLIT_KEYS = frozenset({"fold", "partition", "set", "split", "subset"})
"""Keys in folder names, such as split=train, that define the split of the files."""


@dataclass(frozen=True)
class Shards:
    """The files of each split, with notes on how they were found."""

    splits: dict[str, list[str]]
    configuration: str | None = None
    """Name of the configuration in README.md that lists them."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Configuration:
    """A configuration of a dataset repository, from its README.md."""

    name: str
    is_default: bool
    patterns: dict[str, list[str]]
    """File patterns of each split; empty if splits follow from the file names."""
    folder: str


def group(root: Path, files: Sequence[str], requested: str | None) -> Shards:
    """Return the files of each split according to README.md, as on the Hub, or else according to their names.

    Args:
        root: The dataset's folder.
        files: Paths of its parquet files, relative to it.
        requested: Name of the requested configuration.

    Raises:
        RequestError: If the configuration does not exist or is ambiguous, or only some files belong to a split.
    """
    stated = _configurations_of(root)
    found = {one.name: splits for one in stated if (splits := _listed(root, files, one))}
    if not found:
        note = "README.md lists none of the existing files; using splits according to their names"
        return Shards(splits_of(root, files), notes=(note,) if stated else ())
    default = [one.name for one in stated if one.is_default] or [one.name for one in stated if one.name == "default"]
    name = requested or next(iter(default), None) or (stated[0].name if len(stated) == 1 else None)
    if name not in found:
        what = "has no default configuration" if name is None else f"lists no existing files for {printable(name)}"
        raise RequestError(
            f"README.md of {printable(root)} {what}; choose one of {listing(found)} with {setting('dataset_config')}"
        )
    used = {file for members in found[name].values() for file in members}
    unlisted = [file for file in files if file not in used]
    notes = [f"using configuration {printable(name)} of README.md"]
    if unlisted:
        notes.append(f"ignored files that configuration {printable(name)} does not list: {listing(unlisted, 4)}")
    return Shards(found[name], name, tuple(notes))


def splits_of(root: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each split according to the names of files or folders; all are `train` if none has one.

    Raises:
        RequestError: If only some names contain a split, or the files seem to belong to several datasets.
    """
    found = {file: _place_of(file) for file in files}
    without = [file for file, place in found.items() if place.split is None]
    named = listing(sorted({place.split for place in found.values() if place.split}))
    if without and len(without) < len(found):
        raise RequestError(
            f"{printable(without[0])} has no split in its name, unlike other files ({named}); rename it, for example "
            f"to train-{posixpath.basename(printable(without[0]))}, or move it elsewhere"
        )
    splits: dict[str, list[str]] = {}
    for file, place in found.items():
        splits.setdefault(place.split or "train", []).append(file)
    for split, members in splits.items():
        _reject_several(root, split, [found[file] for file in members])
    return splits


def folder_columns(files: Iterable[str], own: Collection[str]) -> dict[str, dict[str, str | int | None]]:
    """Return the columns that are encoded in folder names, such as `label=cat/`, by name and file.

    A column with the same value for all files is ignored. A column is numeric if all its values are integers.

    Args:
        files: Paths of the files.
        own: Columns in the files themselves, which take precedence.

    Raises:
        RequestError: If only some files have a column.
    """
    files = list(files)
    found: dict[str, dict[str, str | None]] = {}
    for file in files:
        for key, value in _pairs_of(file):
            found.setdefault(key, {})[file] = value
    columns: dict[str, dict[str, str | int | None]] = {}
    for key, values in found.items():
        if key in own or len(set(values.values())) < 2:
            continue
        outside = [file for file in files if file not in values]
        if outside:
            raise RequestError(
                f"{printable(outside[0])} is not in a {printable(key)}=… folder, unlike the other files; move it into "
                "one, or out of the dataset"
            )
        is_number = all(value and re.fullmatch(r"0|-?[1-9]\d{0,8}", value, re.ASCII) for value in values.values())
        columns[key] = {file: int(value) if is_number and value else value for file, value in values.items()}
    return columns


@dataclass(frozen=True)
class _Place:
    """The split in a file's path, and the folders above and below the part that contains it."""

    split: str | None
    above: str
    below: str
    series: str = ""
    """Name of the file or folder that contains the split, without shard numbers."""


def _place_of(file: str) -> _Place:
    folder, name = posixpath.split(file.removesuffix(".parquet"))
    parts = folder.split("/") if folder else []
    split = split_keyword(name)
    if split:
        return _Place(split, _joined(parts), "", _series_of(name))
    for i, part in reversed([*enumerate(parts)]):
        key, is_pair, _ = part.partition("=")
        split = split_keyword(part) if not is_pair or key.lower() in _SPLIT_KEYS else None
        if split:
            return _Place(split, _joined(parts[:i]), _joined(parts[i + 1 :]), _series_of(part))
    return _Place(None, "", _joined(parts))


def _series_of(name: str) -> str:
    """Return a name without shard numbers; fold numbers are kept."""
    words = re.findall(r"fold\W?_?\d+|[^\W\d_]+", name.lower())
    return " ".join(word for word in words if word not in ("of", "part", "shard"))


def _joined(parts: Iterable[str]) -> str:
    return "/".join(part for part in parts if "=" not in part)


def _reject_several(root: Path, split: str, places: Sequence[_Place]) -> None:
    """Raise RequestError if the files of a split seem to belong to several datasets."""
    above = sorted({place.above for place in places})
    if len(above) > 1:
        where = [folder or "the folder itself" for folder in above]
        raise RequestError(
            f"{printable(root)} has parquet files of the {printable(split)} split in several places "
            f"({listing(where, 4)}), which could be configurations or folds; use one of them, such as "
            f"{setting('dataset', root / above[-1])}, or move all files into one folder"
        )
    series = sorted({place.series for place in places})
    if len(series) > 1:
        raise RequestError(
            f"{printable(root)} has several series of parquet files of the {printable(split)} split "
            f"({listing(series, 4)}), which could be configurations or folds; use one file or folder as "
            f"{setting('dataset')}, or give all of them the same base name, such as {printable(split)}-0.parquet and "
            f"{printable(split)}-1.parquet"
        )
    below = sorted({place.below for place in places})
    if len({re.sub(r"\d+", "", folder) for folder in below}) > 1:
        raise RequestError(
            f"{printable(root)} has parquet files in the folders {listing((folder or '.' for folder in below), 4)}, "
            "whose names are not used as labels; if they are classes, rename them to label=NAME and use "
            f"{setting('label_column', 'label')}; if not, move all files into one folder, or use one folder as "
            f"{setting('dataset')}"
        )


def _pairs_of(file: str) -> list[tuple[str, str | None]]:
    found = []
    for part in posixpath.dirname(file).split("/"):
        key, is_pair, value = part.partition("=")
        if is_pair and key and key.lower() not in _SPLIT_KEYS:
            found.append((unquote(key), None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)))
    return found


def _configurations_of(root: Path) -> list[_Configuration]:
    """Return the configurations in the README.md of a dataset repository."""
    path = root / "README.md"
    if not path.is_file():
        return []
    remedy = "fix the file, or move it elsewhere to split files by their names"
    try:
        text = read_regular(path, _README_BYTES).decode("utf-8-sig", "replace").replace("\r\n", "\n")
        block = _configs_block(text)
        if len(block) > YAML_BYTES:
            raise ValueError(f"they have more than {YAML_BYTES} characters")
        return [_configuration(entry) for entry in parse_yaml(block).get("configs") or []]
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise RequestError(f"{printable(path)} has invalid configs ({one_line(error)}); {remedy}") from error


def _configs_block(text: str) -> str:
    """Return the lines of the key `configs` in the YAML header of a README.md."""
    lines = text.split("\n")
    if lines[0].strip() != "---":
        return ""
    ends = [i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"]
    header = lines[1 : ends[0]] if ends else []
    starts = [i for i, line in enumerate(header) if line.startswith("configs:")]
    if not starts:
        return ""
    block = header[starts[0] : starts[0] + 1]
    for line in header[starts[0] + 1 :]:
        if re.match(r"[\w\"']", line):  # the next key
            break
        block.append(line)
    return "\n".join(block)


def _configuration(entry: Mapping[str, Any]) -> _Configuration:
    from datasets.data_files import sanitize_patterns

    files = entry.get("data_files")
    stated = {} if files is None else sanitize_patterns(files)
    patterns = {str(split): list(map(str, of_split)) for split, of_split in stated.items()}
    folder = posixpath.normpath(str(entry.get("data_dir") or "."))
    return _Configuration(
        name=str(entry.get("config_name", "default")),
        is_default=entry.get("default") is True,
        patterns=patterns,
        folder="" if folder == "." else folder,
    )


def _listed(root: Path, files: Sequence[str], configuration: _Configuration) -> dict[str, list[str]]:
    """Return the existing files of each split of a configuration."""
    start = f"{configuration.folder}/" if configuration.folder else ""
    if not configuration.patterns:
        inside = [file for file in files if file.startswith(start)]
        return splits_of(root, inside) if start and inside else {}
    splits = {
        split: _matching(files, [start + pattern for pattern in patterns])
        for split, patterns in configuration.patterns.items()
    }
    members = [file for of_split in splits.values() for file in of_split]
    twice = [file for file, count in Counter(members).items() if count > 1]
    if twice:
        raise RequestError(
            f"README.md of {printable(root)} lists {printable(twice[0])} in several splits of the configuration "
            f"{printable(configuration.name)}; correct README.md, or move it elsewhere"
        )
    return {split: of_split for split, of_split in splits.items() if of_split}


def _matching(files: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the paths that match one of the patterns; `**` matches any number of folders."""
    normal = [posixpath.normpath(pattern) for pattern in patterns]
    plain = {pattern for pattern in normal if not re.search(r"[*?\[]", pattern)}
    compiled = [
        [None if piece == "**" else re.compile(translate(piece)) for piece in pattern.split("/")]
        for pattern in normal
        if pattern not in plain
    ]
    return [file for file in files if file in plain or any(_matches(file.split("/"), pieces) for pieces in compiled)]


def _matches(parts: Sequence[str], pieces: Sequence[re.Pattern[str] | None]) -> bool:
    matched = {0}  # numbers of leading parts that the pieces so far can match
    for piece in pieces:
        if piece is None:
            matched = set(range(min(matched), len(parts) + 1)) if matched else matched
        else:
            matched = {i + 1 for i in matched if i < len(parts) and piece.match(parts[i])}
    return len(parts) in matched
