"""A single file as a dataset: parquet is opened, anything else raises an error that explains how to use it."""

from typing import TYPE_CHECKING

from resnext_hub.data.sources.idx import is_idx
from resnext_hub.data.sources.parquet import open_parquet
from resnext_hub.data.sources.refusals import LAYOUTS, TABLE_SUFFIXES
from resnext_hub.data.sources.shards import Shards, splits_of
from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.data.sources.walk import ARCHIVES, is_image
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.data.sources.request import Request


class SingleFile:
    """A path that is not a folder."""

    def matches(self, request: "Request") -> bool:
        """Return whether something other than a folder is requested."""
        return not request.is_folder

    def open(self, request: "Request") -> OpenDataset:
        """Open a parquet file.

        Raises:
            RequestError: If it is anything else.
        """
        path = request.path
        assert path is not None
        name = printable(path)
        if not path.is_file():
            raise RequestError(f"{name} is neither a folder nor a regular file; expected {LAYOUTS}")
        if path.name.lower().endswith(".parquet"):
            return open_parquet(path.parent, Shards(splits_of(path.parent, [path.name])), request.config.streaming)
        if path.name.lower().endswith(ARCHIVES):
            raise RequestError(f"{name} is neither a zip nor a tar file; unpack it and use the folder")
        if path.name.lower().endswith(TABLE_SUFFIXES):
            raise RequestError(
                f"{name} is a table in a format that is not supported; convert it to CSV, TSV, JSON lines or parquet"
            )
        if is_idx(path.name):
            raise RequestError(f"{name} is one of several IDX files; use its folder as {setting('dataset')}")
        what = "an image, not a dataset" if is_image(path.name) else "not a parquet file"
        raise RequestError(f"{name} is {what}; expected {LAYOUTS}")
