"""Where tables of pictures come from: the bundled digits, a folder, parquet files, the Hub.

Each source gives tables by the name of their split, as `datasets.Dataset`s whose pictures are not decoded.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from resnext_hub.errors import RequestError, RunError, one_line

if TYPE_CHECKING:
    import datasets

PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Names under which people keep an evaluation split, the one to prefer first."""


def load_digits_table() -> "datasets.Dataset":
    """Give scikit-learn's digits as PNG pictures: grey levels 0 to 16 become 0 to 255."""
    import datasets
    from sklearn.datasets import load_digits

    bunch = load_digits()
    encoded = []
    for pixels in np.round(bunch.images * (255 / 16)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=[str(n) for n in bunch.target_names]),
        }
    )
    return datasets.Dataset.from_dict({"image": encoded, "label": bunch.target.tolist()}, features=features)


def load_folder(root: Path) -> tuple[dict[str, "datasets.Dataset"], list[tuple[str, int]]]:
    """Open a folder of class folders, or of splits that hold class folders.

    The files are listed here, because a guess from folder names goes wrong silently: a class called `train` beside
    others would be taken for the only split. Names of splits count when every folder at the top is one and
    holds class folders itself.
    """
    folders = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise RequestError(
            f"{root} holds no folders: expected one folder of pictures per class, or parquet files with an image column"
        )
    names = (*TRAIN_NAMES, *EVAL_NAMES)
    if all(name.lower() in names for name in folders) and not any(_holds_pictures(root / name) for name in folders):
        roots = {name: root / name for name in folders}
    else:
        roots = {"train": root}

    classes = sorted({p.name for r in roots.values() for p in r.iterdir() if p.is_dir() and not p.name.startswith(".")})
    by_split = {split: _list_pictures(split_root, classes) for split, split_root in roots.items()}
    filled = [name for i, name in enumerate(classes) if any(i in labels for _, labels in by_split.values())]
    if not filled:
        raise RequestError(
            f"{root} holds no pictures in its class folders; known suffixes: {' '.join(PICTURE_SUFFIXES)}"
        )
    renumber = {classes.index(name): new for new, name in enumerate(filled)}

    import datasets

    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=filled)})
    tables = {}
    files = []
    for split, (paths, labels) in by_split.items():
        if not paths:
            raise RequestError(f"{roots[split]} holds no pictures in class folders")
        tables[split] = datasets.Dataset.from_dict(
            {"image": [str(p) for p in paths], "label": [renumber[label] for label in labels]},
            features=features,
        )
        files += [(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths]
    return tables, files


def _list_pictures(root: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list_pictures(root / name)
        paths += found
        labels += [label] * len(found)
    return paths, labels


def list_pictures(folder: Path) -> list[Path]:
    """Give the pictures anywhere under a folder, known by their suffixes, in the order of their paths."""
    walk = os.walk(folder, followlinks=True)
    return sorted(Path(place, file) for place, _, files in walk for file in files if _is_picture(file))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def _holds_pictures(folder: Path) -> bool:
    return any(entry.is_file() and _is_picture(entry.name) for entry in folder.iterdir())


def parquet_files(path: Path) -> list[Path]:
    """Give the parquet files that a path stands for: itself if it is a file, else those anywhere under it."""
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))


def load_parquet(path: Path, streaming: bool = False) -> "dict[str, datasets.Dataset | datasets.IterableDataset]":
    """Open parquet files; names that begin with a split, as in `test-00000-of-00002.parquet`, make that split.

    Streamed, they are read in place; else they are copied into the library's cache, where each row is at hand.
    """
    import datasets

    files = parquet_files(path)
    if path.is_file() and path.suffix != ".parquet":
        raise RequestError(f"{path} is a file, but not a parquet file: expected a folder of class folders, or .parquet")
    prefix = re.compile(rf"^({'|'.join((*TRAIN_NAMES, *EVAL_NAMES))})(?![a-z])", re.IGNORECASE)
    matches = [prefix.match(file.name) for file in files]
    data_files: dict[str, list[str]] = {}
    for file, match in zip(files, matches, strict=True):
        split = match.group(1).lower() if match and all(matches) else "train"
        data_files.setdefault(split, []).append(str(file))
    try:
        return dict(datasets.load_dataset("parquet", data_files=data_files, streaming=streaming))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise RequestError(f"{path} cannot be read as parquet: {one_line(cause)}") from error


def _undecoded(name: str, table: "datasets.IterableDataset") -> "datasets.IterableDataset":
    """Leave out the threads that decode what comes from afar: they would decode what is passed over, too."""
    if table.features is None:
        raise RequestError(f"{name} does not say which columns it has, which --streaming needs; leave that out")
    return table.decode(False)


def is_hub_id(name: str) -> bool:
    """Say whether a name has the form of a dataset id: `owner/name`, or a name alone."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None


def load_from_hub(
    name: str, config: str | None, revision: str | None, streaming: bool = False
) -> "tuple[dict[str, datasets.Dataset | datasets.IterableDataset], str | None, dict[str, int]]":
    """Open a dataset on the Hub; give its splits, the commit they came from, and the sizes it states of them.

    Streamed, nothing is downloaded before it is read.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if streaming:
            tables = {split: _undecoded(name, table) for split, table in builder.as_streaming_dataset().items()}
        else:
            builder.download_and_prepare()
            tables = dict(builder.as_dataset())
        stated = {split: info.num_examples for split, info in (builder.info.splits or {}).items()}
        return tables, builder.hash, {split: count for split, count in stated.items() if count}
    except datasets.exceptions.DatasetNotFoundError as error:
        raise RequestError(
            f"there is no folder {name} here and no such dataset on the Hub that you may read: {one_line(error)}"
        ) from error
    except datasets.data_files.EmptyDatasetError as error:
        raise RequestError(f"the Hub's {name} holds no files of data: {one_line(error)}") from error
    except (OSError, OfflineModeIsEnabled, HfHubHTTPError) as error:  # the library hides what was lost in the first
        raise RunError(
            f"{name} is no local folder, and the Hub could not be reached for it: {one_line(error)}. "
            "Try again later, or name a local folder"
        ) from error
    except RuntimeError as error:  # from Xet, over which large files come, or of a dataset that is a script
        raise RunError(f"{name} could not be loaded from the Hub: {one_line(error)}") from error
    except (ValueError, HFValidationError) as error:
        hint = "; name one with --dataset-config" if "config" in str(error).lower() else ""
        raise RequestError(f"{name} cannot be opened: {one_line(error)}{hint}") from error
