"""Which parquet files belong together: configurations, splits, and columns that stand in the names of folders."""

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
from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import read_regular
from resnext_hub.text import listing, printable
from resnext_hub.yaml_files import YAML_BYTES, parse_yaml

_README_BYTES = 1 << 24
_SPLIT_KEYS = frozenset({"fold", "partition", "set", "split", "subset"})
"""Columns in the names of folders, such as split=train, that say which split the files are of."""


@dataclass(frozen=True)
class Shards:
    """The files of each split, and how they were found."""

    splits: dict[str, list[str]]
    configuration: str | None = None
    """Name of the configuration of README.md that lists them."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Configuration:
    """A configuration of a repository, as README.md states it."""

    name: str
    is_default: bool
    patterns: dict[str, list[str]]
    """Files of each split; empty where their names say it."""
    folder: str


def group(root: Path, files: Sequence[str], asked: str | None) -> Shards:
    """Return the files of each split as README.md states them, as the Hub does, or by their names.

    Args:
        root: The dataset's folder.
        files: Paths of its parquet files below it.
        asked: Name of the configuration that is asked for.

    Raises:
        RequestError: If there is no such configuration, several could be meant, or only some files are of a split.
    """
    stated = _configurations_of(root)
    found = {one.name: splits for one in stated if (splits := _listed(root, files, one))}
    if not found:
        note = "README.md lists none of the files that are here; splits are read from their names"
        return Shards(splits_of(root, files), notes=(note,) if stated else ())
    default = [one.name for one in stated if one.is_default] or [one.name for one in stated if one.name == "default"]
    name = asked or next(iter(default), None) or (stated[0].name if len(stated) == 1 else None)
    if name not in found:
        what = "states no default configuration" if name is None else f"lists no files here for {printable(name)}"
        raise RequestError(f"README.md of {printable(root)} {what}; name one of {listing(found)} with --dataset-config")
    used = {file for members in found[name].values() for file in members}
    left_out = [file for file in files if file not in used]
    notes = [f"configuration {printable(name)} of README.md"]
    if left_out:
        notes.append(f"left out, as configuration {printable(name)} does not list it: {listing(left_out, 4)}")
    return Shards(found[name], name, tuple(notes))


def splits_of(root: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each split, which file names or folder names mention; all are `train` if none does.

    Raises:
        RequestError: If only some mention one, or files that seem to be of several datasets would be taken together.
    """
    found = {file: _place_of(file) for file in files}
    without = [file for file, place in found.items() if place.split is None]
    named = listing(sorted({place.split for place in found.values() if place.split}))
    if without and len(without) < len(found):
        raise RequestError(
            f"{printable(without[0])} belongs to no split by its name, where other files do ({named}); rename it, such "
            f"as train-{posixpath.basename(printable(without[0]))}, or move it away"
        )
    splits: dict[str, list[str]] = {}
    for file, place in found.items():
        splits.setdefault(place.split or "train", []).append(file)
    for split, members in splits.items():
        _refuse_several(root, split, [found[file] for file in members])
    return splits


def folder_columns(files: Iterable[str], own: Collection[str]) -> dict[str, dict[str, str | int | None]]:
    """Return the columns that stand in the names of folders, such as `label=cat/`, by name and file.

    A column with one value for all files is of no use and left out; whole numbers are numbers if all are.

    Args:
        files: Paths of the files.
        own: Columns that the files themselves have, which count.

    Raises:
        RequestError: If only some files have it.
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
                f"{printable(outside[0])} lies in no folder {printable(key)}=…, as other files do; move it into one, "
                "or away"
            )
        is_number = all(value and re.fullmatch(r"0|-?[1-9]\d{0,8}", value, re.ASCII) for value in values.values())
        columns[key] = {file: int(value) if is_number and value else value for file, value in values.items()}
    return columns


@dataclass(frozen=True)
class _Place:
    """What the path of a file says: its split, and the folders above and below the part that names the split."""

    split: str | None
    above: str
    below: str
    series: str = ""
    """Name of the file or folder that names the split, without the number of a shard."""


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
    """Return a name without numbers, which count shards; the number of a fold is kept."""
    words = re.findall(r"fold\W?_?\d+|[^\W\d_]+", name.lower())
    return " ".join(word for word in words if word not in ("of", "part", "shard"))


def _joined(parts: Iterable[str]) -> str:
    return "/".join(part for part in parts if "=" not in part)


def _refuse_several(root: Path, split: str, places: Sequence[_Place]) -> None:
    """Refuse files of one split that lie in folders whose names could matter."""
    above = sorted({place.above for place in places})
    if len(above) > 1:
        where = [folder or "the folder itself" for folder in above]
        raise RequestError(
            f"{printable(root)} holds parquet files of the split {printable(split)} in several places "
            f"({listing(where, 4)}), which could be configurations or folds: give one as --dataset, such as "
            f"{printable(root / above[-1])}, or move all files into one folder"
        )
    series = sorted({place.series for place in places})
    if len(series) > 1:
        raise RequestError(
            f"{printable(root)} holds several kinds of parquet files of the split {printable(split)} "
            f"({listing(series, 4)}), which could be configurations or folds: give one file or folder as --dataset, or "
            f"rename them alike, such as {printable(split)}-0.parquet and {printable(split)}-1.parquet"
        )
    below = sorted({place.below for place in places})
    if len({re.sub(r"\d+", "", folder) for folder in below}) > 1:
        raise RequestError(
            f"{printable(root)} holds parquet files in the folders {listing((folder or '.' for folder in below), 4)}, "
            "but labels come from a column of the files: if the folders are the classes, call them label=NAME and add "
            "--label-column label; if not, move all files into one folder, or give one as --dataset"
        )


def _pairs_of(file: str) -> list[tuple[str, str | None]]:
    found = []
    for part in posixpath.dirname(file).split("/"):
        key, is_pair, value = part.partition("=")
        if is_pair and key and key.lower() not in _SPLIT_KEYS:
            found.append((unquote(key), None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)))
    return found


def _configurations_of(root: Path) -> list[_Configuration]:
    """Return the configurations that the README.md of a repository states with their files."""
    path = root / "README.md"
    if not path.is_file():
        return []
    way_out = "mend it, or move it away to have files split by their names"
    try:
        text = read_regular(path, _README_BYTES).decode("utf-8-sig", "replace").replace("\r\n", "\n")
        block = _configs_block(text)
        if len(block) > YAML_BYTES:
            raise ValueError(f"its configs have more than {YAML_BYTES} characters")
        return [_configuration(entry) for entry in parse_yaml(block).get("configs") or []]
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise RequestError(f"{printable(path)} states its configs wrongly ({one_line(error)}); {way_out}") from error


def _configs_block(text: str) -> str:
    """Return the lines of the key `configs` in the YAML at the beginning of a README.md."""
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
    """Return the files of each split of a configuration that are here."""
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
            f"{printable(configuration.name)}; mend it, or move it away"
        )
    return {split: of_split for split, of_split in splits.items() if of_split}


def _matching(files: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the paths that match one of the patterns, in which `**` stands for any folders."""
    normal = [posixpath.normpath(pattern) for pattern in patterns]
    plain = {pattern for pattern in normal if not re.search(r"[*?\[]", pattern)}
    compiled = [
        [None if piece == "**" else re.compile(translate(piece)) for piece in pattern.split("/")]
        for pattern in normal
        if pattern not in plain
    ]
    return [file for file in files if file in plain or any(_matches(file.split("/"), pieces) for pieces in compiled)]


def _matches(parts: Sequence[str], pieces: Sequence[re.Pattern[str] | None]) -> bool:
    matched = {0}  # numbers of parts that the pieces so far can stand for
    for piece in pieces:
        if piece is None:
            matched = set(range(min(matched), len(parts) + 1)) if matched else matched
        else:
            matched = {i + 1 for i in matched if i < len(parts) and piece.match(parts[i])}
    return len(parts) in matched
