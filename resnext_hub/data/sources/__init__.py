"""Where images and labels come from: one file for each kind of layout, all opened as a `Source`."""

import os
from pathlib import Path

from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources.digits import BUNDLED, load_digits_table
from resnext_hub.data.sources.folders import (
    LAYOUTS,
    TABLE_SUFFIXES,
    open_folders,
    refuse_linked_splits,
    refuse_no_images,
)
from resnext_hub.data.sources.hub import is_hub_id, load_from_hub
from resnext_hub.data.sources.parquet import has_images, open_parquet, parquet_files, read_part
from resnext_hub.data.sources.saved import is_saved, open_saved
from resnext_hub.data.sources.shards import Shards, group, splits_of
from resnext_hub.data.sources.source import Part, Source
from resnext_hub.data.sources.tables import find_tables, label_column_of, open_tables
from resnext_hub.data.sources.walk import (
    PICTURE_SUFFIXES,
    Tree,
    is_picture,
    is_run_folder,
    list_pictures,
    skipped,
    walk,
)
from resnext_hub.errors import RequestError
from resnext_hub.text import listing, printable

__all__ = [
    "BUNDLED",
    "LAYOUTS",
    "PICTURE_SUFFIXES",
    "Part",
    "Source",
    "bundled",
    "check_source",
    "dataset_name",
    "list_pictures",
    "load_digits_table",
    "load_from_hub",
    "local_path",
    "open_source",
]

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def bundled(config: DataConfig) -> bool:
    """Return whether the bundled digits are asked for."""
    return config.dataset in (BUNDLED, f"bundled:{BUNDLED}")


def local_path(config: DataConfig) -> Path | None:
    """Return the local path that is asked for, if it is one that exists."""
    path = Path(os.path.expanduser(config.dataset))
    return path if not bundled(config) and os.path.lexists(path) else None


def dataset_name(config: DataConfig) -> str:
    """Return a short name for what is asked for, such as the last part of a path."""
    path = Path(os.path.expanduser(config.dataset))
    return BUNDLED if bundled(config) else path.name or path.resolve().name


def check_source(config: DataConfig) -> None:
    """Refuse what is neither here nor can be on the Hub, before anything is fetched.

    Raises:
        RequestError: If it is so, or the name of the bundled dataset is that of a folder here, too.
    """
    if config.dataset == BUNDLED and os.path.lexists(BUNDLED):
        raise RequestError(
            f"--dataset {BUNDLED} is the bundled dataset, and {BUNDLED} is here as well: "
            f"--dataset ./{BUNDLED} or --dataset bundled:{BUNDLED}"
        )
    if config.dataset.startswith("bundled:") and not bundled(config):
        raise RequestError(f"--dataset {printable(config.dataset)}: the bundled dataset is bundled:{BUNDLED}")
    if not bundled(config) and local_path(config) is None and not is_hub_id(config.dataset):
        raise RequestError(
            f"there is no folder or file {printable(config.dataset)}, and it is no dataset id of the Hub either"
        )


def open_source(config: DataConfig) -> Source:
    """Open what a configuration asks for.

    Raises:
        RequestError: If it cannot be opened as images with labels.
        RunError: If the Hub cannot be reached.
    """
    check_source(config)
    path = local_path(config)
    if bundled(config):
        _check_not_streamed(config)
        source = Source(tables={"train": load_digits_table()})
    elif path is None:
        source = load_from_hub(config.dataset, config.dataset_config, config.dataset_revision, config.streaming)
    elif path.is_dir():
        source = _open_folder(path, config)
    else:
        source = _open_file(path, config)
    if source.revision is None and (
        config.dataset_revision or config.dataset_config not in (None, source.configuration)
    ):
        raise RequestError(
            "--dataset-config and --dataset-revision go with a dataset on the Hub; the former also with a folder of "
            "parquet files whose README.md states its configs"
        )
    if config.layout and source.roots is not None:
        raise RequestError(f"--layout goes with folders of images; {printable(config.dataset)} is none")
    return source


def _open_file(path: Path, config: DataConfig) -> Source:
    name = printable(path)
    if path.name.lower().endswith(".parquet"):
        return open_parquet(path.parent, Shards(splits_of(path.parent, [path.name])), config.streaming)
    if path.name.lower().endswith(_ARCHIVES):
        raise RequestError(f"{name} is an archive; unpack it and give the folder: {LAYOUTS}")
    if path.name.lower().endswith(TABLE_SUFFIXES):
        raise RequestError(
            f"{name} is a table, but not a parquet file: name it metadata.csv, with the columns file_name and label, "
            "and give the folder that holds it"
        )
    if not path.is_file():
        raise RequestError(f"{name} is no folder and no regular file; expected a folder: {LAYOUTS}")
    what = "an image" if is_picture(path.name) else "a file"
    raise RequestError(f"{name} is {what}, but not a parquet file; expected a folder: {LAYOUTS}")


def _open_folder(root: Path, config: DataConfig) -> Source:
    if is_run_folder(_names(root)):
        raise RequestError(f"{printable(root)} is a run folder; expected a folder of images: {LAYOUTS}")
    tree = walk(root)
    if is_saved(root):
        _check_not_streamed(config)
        return open_saved(tree)
    if config.layout != "classes":
        refuse_linked_splits(tree)
    tables = find_tables(tree, config.label_column) if config.layout is None else []
    column = label_column_of(tree, tables, config.label_column) if tables else None
    if column is not None:
        _check_not_streamed(config)
        return _described(open_tables(tree, tables, column, config.eval_split), tree, [table.path for table in tables])
    parquet = _parquet_with_images(tree, {table.path for table in tables})
    if parquet:
        loose = [f"{len(tree.images)} image files outside the parquet files"] if tree.images else []
        shards = group(root, parquet, config.dataset_config)
        return _described(open_parquet(root, shards, config.streaming), tree, parquet, loose)
    _check_not_streamed(config)
    if not tree.images:
        refuse_no_images(tree, _ARCHIVES)
    return _described(open_folders(tree, config.layout), tree, [])


def _parquet_with_images(tree: Tree, tables: set[str]) -> list[str]:
    """Return the parquet files that are the dataset, if they are: all where there are no image files, else none.

    Raises:
        RequestError: If there are image files in folders as well as parquet files of images, or one cannot be read.
    """
    files = [path for path in parquet_files(tree) if path not in tables]
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
                f"{printable(tree.root)} holds images in folders ({listing(sorted(folders), 4)}) and parquet files of "
                f"images ({printable(path)}): move one of them away, or give the parquet file itself as --dataset"
            )
    return []


def _described(source: Source, tree: Tree, used: list[str], left_out: list[str] | None = None) -> Source:
    """Add to the notes what was left out."""
    left_out = list(left_out or [])
    for what, places in (
        ("", tree.junk),
        ("run folder ", tree.runs),
        ("link to a folder found elsewhere ", tree.repeated),
        ("link that leads nowhere ", tree.broken),
    ):
        left_out += [f"{what}{printable(place)}" for place in sorted(places)[:4]]
        left_out += [f"{len(places) - 4} more such folders"] if len(places) > 4 else []
    notes = [*source.notes, *([f"left out: {', '.join(left_out)}"] if left_out else [])]
    stray = [path for path in parquet_files(tree) if path not in used]
    if stray:
        notes.append(f"left out, as it holds no images: {listing(stray, 4)}")
    files = skipped(tree, [*used, *stray])
    return source.with_notes((*notes, files) if files else notes)


def _check_not_streamed(config: DataConfig) -> None:
    if config.streaming:
        raise RequestError(
            f"--streaming goes with a Hub dataset or parquet files; {printable(config.dataset)} is read in place as it "
            "is"
        )


def _names(root: Path) -> list[str]:
    try:
        return os.listdir(root)
    except OSError as error:
        raise RequestError(f"{printable(root)} cannot be read: {(error.strerror or '').lower()}") from error
