"""Datasets on the Hub, downloaded or streamed."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from resnext_hub.data.sources.parquet import DAMAGED, check_cache, part_of, quiet_library, require_space
from resnext_hub.data.sources.source import OpenDataset, Part
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

_ID_LENGTH = 96 * 2 + 1
"""Most characters of an ID: owner and name may have 96 each."""

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
            tables = {split: _undecoded(name, table) for split, table in builder.as_streaming_dataset().items()}
        else:
            with quiet_library():
                builder.download_and_prepare()
            tables = dict(builder.as_dataset())
        stated = {split: info.num_examples for split, info in (builder.info.splits or {}).items()}
        return OpenDataset(
            tables=tables,
            parts=_parts(builder),
            roots=(
                os.path.realpath(HF_HUB_CACHE),
                os.path.realpath(datasets.config.HF_DATASETS_CACHE),
                "hf://datasets/",
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


def _undecoded(name: str, table: "datasets.IterableDataset") -> "datasets.IterableDataset":
    """Return a stream without decoding: the decoder threads of datasets would also decode skipped images."""
    if table.features is None:
        raise RequestError(
            f"{name} does not describe its columns, which {setting('streaming', True)} needs; use "
            f"{setting('streaming', False)}"
        )
    return table.decode(False)


def _parts(builder: Any) -> dict[str, tuple[Part, ...]]:
    """Return each parquet file's own description of its columns; other formats have one description for all files."""
    if type(builder).__module__.rpartition(".")[2] != "parquet":
        return {}
    files = [(str(split), str(url)) for split, urls in builder.config.data_files.items() for url in urls]
    stated = builder.config.features
    found: dict[str, tuple[Part, ...]] = {}
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        for (split, _), part in zip(files, pool.map(_read_part, (url for _, url in files)), strict=True):
            # a file without its own description has the columns that the repository states for all
            features = {
                column: _own_or_stated(kind, (stated or {}).get(column)) for column, kind in part.features.items()
            }
            found[split] = (*found.get(split, ()), Part(part.name, part.rows, features))
    return found


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
