"""Settings of the dataset."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from resnext_hub.settings import FREE_PER_PROCESS, Range, check_fields


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source of the images and labels."""

    dataset: str = "digits"
    """The bundled `digits`, a folder of class folders, parquet files, or a dataset id on the Hub."""
    dataset_config: str | None = None
    """Configuration (subset) of a Hub dataset, or of a clone of one, that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub dataset; its newest commit if not given."""
    layout: Literal["classes", "splits"] | None = None
    """Whether the top folders of a local dataset are classes or splits; inferred from their names if not given."""
    train_split: str | None = None
    """Split to train on; found by its name if not given."""
    eval_split: str | None = None
    """Split to evaluate on; found by its name if not given, and held out from the training split if there is none."""
    image_column: str | None = None
    """Column that holds the images; found by its type if not given."""
    label_column: str | None = None
    """Column that holds the labels; found by its type if not given."""
    eval_fraction: Annotated[float, Range(0, 0.9, above=True)] = 0.2
    """Fraction of each class that is held out if there is no evaluation split, 0.9 at most."""
    split_seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of the held-out split; separate from `seed`, so runs with different seeds share one evaluation split."""
    max_bad_fraction: Annotated[float, Range(0, 1)] = field(default=0.01, metadata=FREE_PER_PROCESS)
    """Fraction of a split that may be unreadable before the run stops; a single image never stops it."""
    streaming: bool = False
    """Read a Hub dataset or parquet files in order, without a copy on disk; needs an evaluation split."""
    shuffle_block: Annotated[int, Range(1, 10_000_000)] = 1000
    """With streaming, number of consecutive samples that are kept in memory and shuffled among themselves."""

    def __post_init__(self) -> None:
        check_fields(self)
