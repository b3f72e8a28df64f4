"""What is asked for of the data."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from resnext_hub.settings import FREE_PER_PROCESS, Range, check_fields


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from."""

    dataset: str = "digits"
    """The bundled `digits`, a folder of class folders, parquet files, or a dataset id on the Hub."""
    dataset_config: str | None = None
    """Configuration (subset) of a Hub dataset, or of a clone of one, that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub dataset; its newest commit if not given."""
    layout: Literal["classes", "splits"] | None = None
    """What the folders at the top of a local dataset are; found by their names if not given."""
    train_split: str | None = None
    """Split to train on; found by its name if not given."""
    eval_split: str | None = None
    """Split to evaluate on; found by its name if not given, and cut from the training split if there is none."""
    image_column: str | None = None
    """Column that holds the images; found by its type if not given."""
    label_column: str | None = None
    """Column that holds the classes; found by its type if not given."""
    eval_fraction: Annotated[float, Range(0, 0.9, above=True)] = 0.2
    """Fraction of each class of the training split that is held out where there is no evaluation split, 0.9 at most."""
    split_seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of that cut; apart from `seed`, so that runs with other seeds are measured on the same images."""
    max_bad_fraction: Annotated[float, Range(0, 1)] = field(default=0.01, metadata=FREE_PER_PROCESS)
    """Fraction of a split that may be unreadable before the run stops; a single image never stops it."""
    streaming: bool = False
    """Read a Hub dataset or parquet files in order instead of keeping them on the disk; needs an evaluation split."""
    shuffle_block: Annotated[int, Range(1, 10_000_000)] = 1000
    """With streaming: how many consecutive samples are held and shuffled among themselves."""

    def __post_init__(self) -> None:
        check_fields(self)
