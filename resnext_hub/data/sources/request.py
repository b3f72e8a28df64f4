"""The requested dataset: its path, its files, and its tables, each read once."""

import os
from functools import cached_property
from pathlib import Path

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources.digits import BUNDLED
from resnext_hub.data.sources.finders import ImageFinder
from resnext_hub.data.sources.listed import find_listed
from resnext_hub.data.sources.parquet import has_images, parquet_files, read_part
from resnext_hub.data.sources.refusals import LAYOUTS, reject_linked_splits
from resnext_hub.data.sources.table_columns import Table, label_column_of
from resnext_hub.data.sources.tables import find_tables
from resnext_hub.data.sources.urls import is_url, public_name
from resnext_hub.data.sources.walk import Tree, is_run_folder, walk
from resnext_hub.data.sources.webdataset import find_shards
from resnext_hub.errors import RequestError, setting
from resnext_hub.text import listing, printable


class Request:
    """A requested dataset; all properties are computed on first use.

    Args:
        config: Settings of the dataset.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @property
    def is_bundled(self) -> bool:
        """Whether the bundled digits are requested."""
        return self.config.dataset in (BUNDLED, f"bundled:{BUNDLED}")

    @cached_property
    def path(self) -> Path | None:
        """The requested local path, or None if it does not exist."""
        if is_url(self.config.dataset):
            return None
        path = Path(os.path.expanduser(self.config.dataset))
        return path if not self.is_bundled and os.path.lexists(path) else None

    @property
    def is_folder(self) -> bool:
        """Whether a local folder is requested."""
        return self.path is not None and self.path.is_dir()

    @property
    def name(self) -> str:
        """A short name, such as the last part of a path."""
        path = Path(os.path.expanduser(public_name(self.config.dataset)))
        return BUNDLED if self.is_bundled else path.name or path.resolve().name

    @cached_property
    def root(self) -> Path:
        """The requested folder.

        Raises:
            RequestError: If it cannot be read, or is a run folder.
        """
        assert self.path is not None
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise RequestError(f"{printable(self.path)} cannot be read: {(error.strerror or '').lower()}") from error
        if is_run_folder(names):
            raise RequestError(f"{printable(self.path)} is a run folder, not a dataset; expected {LAYOUTS}")
        return self.path

    @cached_property
    def tree(self) -> Tree:
        """The files of the requested folder."""
        return walk(self.root)

    @cached_property
    def tables(self) -> list[Table]:
        """Metadata files with a column `file_name`; none if a layout of folders is requested.

        Raises:
            RequestError: If a link would fill a split with images of another one, or a file cannot be read.
        """
        if self.config.layout != "classes":
            reject_linked_splits(self.tree)
        return find_tables(self.tree, self.config.label_column) if self.config.layout is None else []

    @cached_property
    def label_column(self) -> str | None:
        """The label column of the metadata files, or None if folders define the classes."""
        return label_column_of(self.tree, self.tables, self.config.label_column) if self.tables else None

    @cached_property
    def listed(self) -> list[Table]:
        """Tables of any other name that list the images of a folder without class folders.

        Raises:
            RequestError: If it is ambiguous which one defines the labels.
        """
        if self.tables or self.config.layout is not None:
            return []
        return find_listed(self.tree, self.config.label_column, lambda: self.finder)

    @cached_property
    def finder(self) -> ImageFinder:
        """What finds the images that tables list."""
        return ImageFinder(self.tree)

    @cached_property
    def webdataset(self) -> list[str]:
        """WebDataset shards: the requested file, or those in a folder without image files."""
        if self.path is None:
            return []
        if not self.is_folder:
            return find_shards(self.path.parent, [self.path.name])
        return [] if self.tree.images else find_shards(self.root, self.tree.others)

    @cached_property
    def parquet(self) -> list[str]:
        """The parquet files of the dataset: those with images, or all if there are no image files either.

        Raises:
            RequestError: If there are both image folders and parquet files with images, or one cannot be read.
        """
        tree = self.tree
        metadata = {table.path for table in self.tables}
        files = [path for path in parquet_files(tree) if path not in metadata]
        folders = {path.partition("/")[0] for path in tree.images if "/" in path}
        if len(folders) < 2:
            with_images = [path for path in files if has_images(read_part(tree.root / path, path).features)]
            return with_images or ([] if tree.images else files)
        for path in files:
            try:
                found = has_images(read_part(tree.root / path, path).features)
            except RequestError:  # a stray file that is not parquet
                continue
            if found:
                raise RequestError(
                    f"{printable(tree.root)} has both image folders ({listing(sorted(folders), 4)}) and a parquet file "
                    f"with images ({printable(path)}); move one of them elsewhere, or use "
                    f"{setting('dataset', tree.root / path)}"
                )
        return []

    def require_no_streaming(self) -> None:
        """Raise RequestError if streaming is requested for a local dataset that is read in place anyway."""
        if self.config.streaming:
            raise RequestError(
                f"{setting('streaming', True)} needs a Hub dataset, parquet files or WebDataset shards, but "
                f"{printable(self.config.dataset)} is none of these; use {setting('streaming', False)}"
            )
