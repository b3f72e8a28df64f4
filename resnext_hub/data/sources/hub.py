"""Datasets on the Hub, downloaded or streamed."""

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resnext_hub.data.sources.parquet import DAMAGED, check_cache, part_from, part_of, quiet_library, require_space
from resnext_hub.data.sources.parquet_shards import ParquetShard, remote_shards
from resnext_hub.data.sources.ranges import hub_file
from resnext_hub.data.sources.source import OpenDataset, Part
from resnext_hub.data.sources.streamed import StreamedTable, listed_shards
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

_ID_LENGTH = 96 * 2 + 1
"""Most characters of an ID: owner and name may have 96 each."""

_HUB = "hf://datasets/"
"""Prefix of the addresses of files on the Hub."""

_FOOTERS_AT_ONCE = 16
"""Number of parquet footers that are fetched concurrently."""


class HubDataset:
    """A dataset on the Hub."""

    def matches(self, request: "Request") -> bool:
        """Return whether there is no local path of that name."""
        return request.path is None

    def open(self, request: "Request") -> OpenDataset:
        """Download it, or open it as a stream."""
        config = request.config
        return load_from_hub(config.dataset, config.dataset_config, config.dataset_revision, config.streaming)


def is_hub_id(name: str) -> bool:
    """Return whether a name is a valid dataset ID: `owner/name` or just `name`."""
    return len(name) <= _ID_LENGTH and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def load_from_hub(name: str, config: str | None, revision: str | None, streaming: bool = False) -> OpenDataset:
    """Open a dataset on the Hub.

    With streaming, images are downloaded only when they are read.

    Raises:
        RequestError: If the dataset does not exist, or cannot be opened as requested.
        RunError: If the Hub cannot be reached.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    check_cache()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if streaming:
            return _in_place(name, builder)
        with quiet_library():
            builder.download_and_prepare()
        stated = {split: info.num_examples for split, info in (builder.info.splits or {}).items()}
        return OpenDataset(
            tables=dict(builder.as_dataset()),
            parts=_parts(builder),
            roots=(
                os.path.realpath(HF_HUB_CACHE),
                os.path.realpath(datasets.config.HF_DATASETS_CACHE),
                _HUB,
            ),
            revision=builder.hash,
            stated={split: count for split, count in stated.items() if count},
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise RequestError(
            f"{name} is neither a local folder nor a dataset on the Hub that you can access: {one_line(error)}"
        ) from error
    except datasets.data_files.EmptyDatasetError as error:
        raise RequestError(f"{name} on the Hub has no data files: {one_line(error)}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        require_space(cause)
        raise RequestError(f"{name} on the Hub cannot be read: {one_line(cause)}") from error
    # HTTPError: of the Hub and of its client's HTTP library; OSError: datasets hides the connection error
    except (OSError, OfflineModeIsEnabled, HTTPError) as error:
        raise RunError(
            f"{name} is not a local folder, and the Hub could not be reached: {one_line(error)}; retry later, or use a "
            "local folder"
        ) from error
    except RuntimeError as error:  # from Xet, the Hub's storage of large files, or for a dataset that is a script
        raise RunError(f"{name} could not be loaded from the Hub: {one_line(error)}") from error
    except (*DAMAGED, HFValidationError) as error:
        hint = f"; choose one with {setting('dataset_config')}" if "config" in str(error).lower() else ""
        raise RequestError(f"{name} cannot be opened: {one_line(error)}{hint}") from error


def _in_place(name: str, builder: Any) -> OpenDataset:
    """Return a dataset whose rows are read when they are needed.

    Raises:
        RequestError: If its files are not parquet files or images.
    """
    kind = type(builder).__module__.rpartition(".")[2]
    if kind == "parquet":
        opened = {str(split): _remote_files(urls) for split, urls in builder.config.data_files.items()}
        parts = {split: tuple(part for part, _ in files) for split, files in opened.items()}
        parts = {split: _described(own, builder) for split, own in parts.items()}
        tables = {
            split: StreamedTable(parts[split][0].features, tuple(shard for _, shard in files))
            for split, files in opened.items()
        }
    elif kind == "imagefolder":
        parts = {}
        tables = {str(split): _listed(name, table) for split, table in builder.as_streaming_dataset().items()}
    else:
        raise _not_streamed(name, f"{kind} files")
    return OpenDataset(tables=tables, parts=parts, roots=(_HUB,), revision=builder.hash)


def _not_streamed(name: str, what: str) -> RequestError:
    return RequestError(
        f"{setting('streaming', True)} needs parquet files or folders of images, but {name} consists of {what}; use "
        f"{setting('streaming', False)}, or the parquet files that the Hub generates for public datasets, with "
        f"{setting('dataset_revision', 'refs/convert/parquet')}"
    )


def _remote_files(urls: Sequence[Any]) -> list[tuple[Part, ParquetShard]]:
    """Return the files of a split that have rows, unless none has any."""
    found = [hub_file(str(url)) for url in urls]
    shards = remote_shards([file for file in found if file is not None], fixed=True)
    files = [(part_from(shard.metadata, printable(shard.name)), shard) for shard in shards]
    return [(part, shard) for part, shard in files if part.rows] or files


def _listed(name: str, table: "datasets.IterableDataset") -> StreamedTable:
    """Return images in files of their own, without reading them."""
    import datasets

    features = dict(table.features or {})
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise _not_streamed(name, "files without classes")
    # undecoded, because the decoder threads of datasets would read all images
    rows = [(row[image], row[label]) for row in table.decode(False)]
    if any(row["bytes"] is not None or "::" in row["path"] for row, _ in rows):
        raise _not_streamed(name, "archives")
    return StreamedTable(features, listed_shards(rows))


def _parts(builder: Any) -> dict[str, tuple[Part, ...]]:
    """Return each parquet file's own description of its columns; other formats have one description for all files."""
    if type(builder).__module__.rpartition(".")[2] != "parquet":
        return {}
    files = [(str(split), str(url)) for split, urls in builder.config.data_files.items() for url in urls]
    found: dict[str, tuple[Part, ...]] = {}
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        for (split, _), part in zip(files, pool.map(_read_part, (url for _, url in files)), strict=True):
            found[split] = (*found.get(split, ()), part)
    return {split: _described(parts, builder) for split, parts in found.items()}


def _described(parts: Iterable[Part], builder: Any) -> tuple[Part, ...]:
    """Return files with the columns that the repository states for all, where a file does not describe its own."""
    stated = builder.config.features or {}
    return tuple(
        replace(part, features={name: _own_or_stated(kind, stated.get(name)) for name, kind in part.features.items()})
        for part in parts
    )


def _own_or_stated(own: Any, stated: Any) -> Any:
    import datasets

    return stated if isinstance(stated, datasets.ClassLabel) and not isinstance(own, datasets.ClassLabel) else own


def _read_part(url: str) -> Part:
    """Read the footer of a parquet file, from the cache if the file was downloaded."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url)
    name = printable(match[3] if match else url)
    cached = try_to_load_from_cache(match[1], match[3], revision=match[2], repo_type="dataset") if match else None
    if isinstance(cached, str):
        with open(cached, "rb") as file:
            return part_of(file, name)
    with HfFileSystem().open(url, "rb", block_size=1 << 16, cache_type="none") as file:
        return part_of(file, name)
