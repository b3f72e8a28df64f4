"""Parquet files on a web server that are streamed: `https://example.com/{train,test}-{000..031}.parquet`."""

import posixpath
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import HTTPError

from resnext_hub.data.sources.parquet import check_columns, part_from
from resnext_hub.data.sources.parquet_shards import ParquetShard, remote_shards
from resnext_hub.data.sources.ranges import Remote
from resnext_hub.data.sources.shards import splits_of
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.streamed import StreamedTable
from resnext_hub.data.sources.urls import is_url, public_name
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.data.sources.request import Request

_MOST_FILES = 100_000


class StreamedUrls:
    """Parquet files at the addresses that a pattern stands for."""

    def matches(self, request: "Request") -> bool:
        """Return whether such files are to be streamed; otherwise, a single file is downloaded first."""
        dataset = request.config.dataset
        name = public_name(dataset).lower()
        return request.config.streaming and is_url(dataset) and bool(re.match(r"https?:.*\.parquet$", name))

    def open(self, request: "Request") -> OpenDataset:
        """Open the files; their splits follow from their names, as in a folder."""
        urls = {public_name(url): url for url in expand(request.config.dataset)}
        scheme, _, _ = next(iter(urls)).partition("://")
        folder = f"{scheme}://{posixpath.commonpath([posixpath.dirname(name.partition('://')[2]) for name in urls])}"
        names = {name: name[len(folder) + 1 :] for name in urls}
        try:
            found = remote_shards([(url, names[name]) for name, url in urls.items()], fixed=False)
            shards = {shard.name: (part_from(shard.metadata, printable(shard.name)), shard) for shard in found}
        except (HTTPError, OSError) as error:
            raise RunError(f"{printable(folder)} cannot be streamed: {one_line(error)}") from error
        except ValueError as error:
            raise RequestError(f"{printable(folder)} cannot be streamed: {one_line(error)}") from error
        check_columns([part for part, _ in shards.values()])
        splits = splits_of(Path(folder), names.values())
        used = {split: [shards[name] for name in members if shards[name][0].rows] for split, members in splits.items()}
        empty = next((split for split, files in used.items() if not files), None)
        if empty is not None:
            raise RequestError(f"the {printable(empty)} split of {printable(folder)} has no rows; omit its files")
        return OpenDataset(
            tables={
                split: StreamedTable(files[0][0].features, tuple(shard for _, shard in files))
                for split, files in used.items()
            },
            parts={split: tuple(part for part, _ in files) for split, files in used.items()},
            files=tuple((_version_of(shard), shard.file.size) for shard in found if isinstance(shard.file, Remote)),
        )


def expand(pattern: str) -> list[str]:
    """Return what a pattern with alternatives `{a,b}` and ranges `{000..031}` stands for.

    Raises:
        RequestError: If a range is not ascending, or there are too many.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    numbers = range(int(bounds[1]), int(bounds[2]) + 1) if bounds else range(0)
    values = [f"{n:0{len(bounds[1])}}" for n in numbers[: _MOST_FILES + 1]] if bounds else match[1].split(",")
    if not 0 < len(values) <= _MOST_FILES:
        raise RequestError(
            f"{setting('dataset', public_name(pattern))}: {match[0]} "
            f"{'stands for too many files' if values else 'is empty'}; expected "
            "alternatives such as {train,test}, or a range such as {000..031}"
        )
    found = (expand(pattern[: match.start()] + value + pattern[match.end() :]) for value in values)
    return list(dict.fromkeys(chain.from_iterable(found)))


def _version_of(shard: ParquetShard) -> str:
    assert isinstance(shard.file, Remote)
    return f"{shard.name} {shard.file.version}"
