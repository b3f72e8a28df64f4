"""Dataset layouts, one `Source` per file."""

import os
from dataclasses import replace

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources.archives import is_archive, unpack
from resnext_hub.data.sources.digits import BUNDLED, BundledDigits, load_digits_table
from resnext_hub.data.sources.folders import ClassFolders
from resnext_hub.data.sources.hub import HubDataset, is_hub_id, load_from_hub
from resnext_hub.data.sources.idx import IdxFiles
from resnext_hub.data.sources.listed import ListedImages, TableFile
from resnext_hub.data.sources.parquet import ParquetFiles
from resnext_hub.data.sources.refusals import LAYOUTS
from resnext_hub.data.sources.request import Request
from resnext_hub.data.sources.saved import SavedDataset
from resnext_hub.data.sources.single_file import SingleFile
from resnext_hub.data.sources.source import OpenDataset, Part, Source
from resnext_hub.data.sources.streamed_urls import StreamedUrls
from resnext_hub.data.sources.tables import MetadataTables
from resnext_hub.data.sources.urls import check_url, download, is_url, public_name
from resnext_hub.data.sources.walk import IMAGE_SUFFIXES, list_images
from resnext_hub.data.sources.webdataset import WebDatasetShards
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import printable

__all__ = [
    "BUNDLED",
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "SOURCES",
    "OpenDataset",
    "Part",
    "Request",
    "Source",
    "check_source",
    "dataset_name",
    "is_url",
    "list_images",
    "load_digits_table",
    "load_from_hub",
    "open_source",
    "public_name",
]

SOURCES: tuple[Source, ...] = (
    StreamedUrls(),
    BundledDigits(),
    HubDataset(),
    TableFile(),
    WebDatasetShards(),
    SingleFile(),
    IdxFiles(),
    SavedDataset(),
    MetadataTables(),
    ParquetFiles(),
    ListedImages(),
    ClassFolders(),
)
"""All layouts; the first one that matches a request opens it."""


def dataset_name(config: DataConfig) -> str:
    """Return a short name for the requested dataset, such as the last part of a path."""
    return Request(config).name


def check_source(config: DataConfig) -> None:
    """Check that a dataset is a local path, a URL or could be on the Hub, before anything is downloaded.

    Raises:
        RequestError: If it is none of these, or a local path has the name of the bundled dataset.
    """
    if is_url(config.dataset):
        check_url(config.dataset)
        return
    request = Request(config)
    if config.dataset == BUNDLED and os.path.lexists(BUNDLED):
        raise RequestError(
            f"{setting('dataset', BUNDLED)} is ambiguous, because there is also a local file or folder {BUNDLED}; "
            f"use {setting('dataset', f'./{BUNDLED}')} for the local one, or "
            f"{setting('dataset', f'bundled:{BUNDLED}')} for the bundled dataset"
        )
    if config.dataset.startswith("bundled:") and not request.is_bundled:
        raise RequestError(
            f"{setting('dataset', config.dataset)}: no such bundled dataset; the only one is bundled:{BUNDLED}"
        )
    if not request.is_bundled and request.path is None and not is_hub_id(config.dataset):
        raise RequestError(
            f"{setting('dataset', config.dataset)} does not exist and is not a valid dataset ID on the Hub; expected a "
            f"folder, a table, a parquet file, a URL, or an ID such as owner/name"
        )


def open_source(config: DataConfig) -> OpenDataset:
    """Open the requested dataset.

    Raises:
        RequestError: If it cannot be opened as images with labels.
        RunError: If the Hub cannot be reached.
    """
    check_source(config)
    request = Request(config)
    if is_url(config.dataset) and not StreamedUrls().matches(request):
        request = Request(replace(config, dataset=str(download(config.dataset))))
    if request.path is not None and is_archive(request.path) and not request.webdataset:
        request = Request(replace(config, dataset=str(unpack(request.path))))
    found = next(source for source in SOURCES if source.matches(request)).open(request)
    if found.revision is None and (config.dataset_revision or config.dataset_config not in (None, found.configuration)):
        raise RequestError(
            f"{setting('dataset_config')} and {setting('dataset_revision')} are only for datasets on the Hub "
            f"({setting('dataset_config')} is also for folders of parquet files with configurations in README.md)"
        )
    if config.layout and found.roots is not None:
        name = printable(public_name(config.dataset))
        raise RequestError(
            f"{setting('layout', config.layout)} is for folders of images, and {name} is not one; omit "
            f"{setting('layout')}"
        )
    return found
