"""The dataset that was requested, looked at once: its path, its files, and the tables among them."""

import os
from functools import cached_property
from pathlib import Path

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources.digits import BUNDLED
from resnext_hub.data.sources.parquet import has_images, parquet_files, read_part
from resnext_hub.data.sources.refusals import LAYOUTS, refuse_linked_splits
from resnext_hub.data.sources.tables import Table, find_tables, label_column_of
from resnext_hub.data.sources.walk import Tree, is_run_folder, walk
from resnext_hub.errors import RequestError
from resnext_hub.text import listing, printable


class Request:
    """What a configuration asks for; everything is computed when it is first needed.

    Args:
        config: The settings of the data.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @property
    def is_bundled(self) -> bool:
        """Whether the bundled digits are requested."""
        return self.config.dataset in (BUNDLED, f"bundled:{BUNDLED}")

    @cached_property
    def path(self) -> Path | None:
        """The local path that is requested, if it is one that exists."""
        path = Path(os.path.expanduser(self.config.dataset))
        return path if not self.is_bundled and os.path.lexists(path) else None

    @property
    def is_folder(self) -> bool:
        """Whether a local folder is requested."""
        return self.path is not None and self.path.is_dir()

    @property
    def name(self) -> str:
        """A short name, such as the last part of a path."""
        path = Path(os.path.expanduser(self.config.dataset))
        return BUNDLED if self.is_bundled else path.name or path.resolve().name

    @cached_property
    def root(self) -> Path:
        """The requested folder.

        Raises:
            RequestError: If it cannot be read, or is the folder of a run.
        """
        assert self.path is not None
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise RequestError(f"{printable(self.path)} cannot be read: {(error.strerror or '').lower()}") from error
        if is_run_folder(names):
            raise RequestError(f"{printable(self.path)} is a run folder; expected a folder of images: {LAYOUTS}")
        return self.path

    @cached_property
    def tree(self) -> Tree:
        """The files of the requested folder."""
        return walk(self.root)

    @cached_property
    def tables(self) -> list[Table]:
        """Metadata files with a column `file_name`; none if --layout says that folders are the labels.

        Raises:
            RequestError: If a link would fill a split with another one's images, or a file cannot be read.
        """
        if self.config.layout != "classes":
            refuse_linked_splits(self.tree)
        return find_tables(self.tree, self.config.label_column) if self.config.layout is None else []

    @cached_property
    def label_column(self) -> str | None:
        """The column of labels in the metadata files, or None if folders state the classes."""
        return label_column_of(self.tree, self.tables, self.config.label_column) if self.tables else None

    @cached_property
    def parquet(self) -> list[str]:
        """The parquet files that are the dataset: all if there are no image files, else those with images.

        Raises:
            RequestError: If there are image files in folders as well as parquet files of images, or one cannot be read.
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
            except RequestError:  # a stray file that is not even parquet
                continue
            if found:
                raise RequestError(
                    f"{printable(tree.root)} holds images in folders ({listing(sorted(folders), 4)}) and parquet files "
                    f"of images ({printable(path)}): move one of them away, or use the parquet file itself as --dataset"
                )
        return []

    def require_no_streaming(self) -> None:
        """Raise RequestError if streaming is requested of what is read in place anyway."""
        if self.config.streaming:
            raise RequestError(
                f"--streaming needs a Hub dataset or parquet files; {printable(self.config.dataset)} is read in place"
            )
