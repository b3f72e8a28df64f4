"""Settings of the dataset."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from resnext_hub.errors import RequestError, setting
from resnext_hub.settings import FREE_PER_PROCESS, Range, check_fields

NO_TEST = "none"
"""Value of `test_split` for a run without a test."""

MOST_FOLDS = 100
"""Largest number of folds."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Dataset.

    The images and labels to train and evaluate on.
    """

    dataset: str = "digits"
    """The bundled dataset `digits`, a folder with one subfolder per class, a table of file names and labels, parquet
    files, WebDataset shards, a zip or tar file that contains one of these, the URL of such a file (https, http, hf or
    s3; with --streaming, also a pattern for parquet files, such as
    https://example.com/{train,test}-{000..031}.parquet), or a dataset ID on the Hub."""
    dataset_config: str | None = None
    """Configuration (subset) to use if a Hub dataset, or a local clone of one, has more than one."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub dataset; the latest commit if not given."""
    layout: Literal["classes", "splits"] | None = None
    """Whether the top-level folders of a local dataset are classes or splits; inferred from their names if not
    given."""
    train_split: str | None = None
    """Split to train on; inferred from the split names if not given."""
    eval_split: str | None = None
    """Split to evaluate on; inferred from the split names if not given. If the dataset has no evaluation split, part of
    the training split is held out."""
    test_split: str | None = None
    """Split on which the best weights are evaluated once, at the end of the run; inferred from the split names if not
    given. Use none to disable this test."""
    image_column: str | None = None
    """Column with the images; inferred from the column types if not given."""
    label_column: str | None = None
    """Column with the labels; inferred from the column names and types if not given."""
    eval_fraction: Annotated[float, Range(0, 0.9, above=True)] = 0.2
    """Fraction of each class to hold out if there is no evaluation split, above 0 and at most 0.9."""
    test_fraction: Annotated[float, Range(0, 0.9)] = 0.0
    """Fraction of each class of the training split, from 0 to 0.9, to hold out for a test at the end of the run, even
    if the dataset has a test split. By default, nothing is held out for a test."""
    folds: Annotated[int, Range(2, MOST_FOLDS)] | None = None
    """K-fold cross-validation: divide the training split into this many parts, evaluate each part with a model that is
    trained on all the other parts, and summarize the results. If not given, a single model is trained, and evaluated on
    an evaluation split."""
    fold: Annotated[int, Range(1, MOST_FOLDS)] | None = None
    """With --folds: train only the model that is evaluated on this part, counting from 1; if not given, train all
    models, one after another."""
    split_seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Random seed for holding out images and for dividing them into folds; separate from --seed, so runs with different
    seeds share one evaluation split."""
    group_duplicates: bool | None = None
    """When holding out images, keep all copies of an image, including resized and mirrored ones, on the same side of
    the split. By default, on for up to 100,000 training images and off for more. This decodes every image once and
    caches the result."""
    exclude: str | None = field(default=None, metadata=FREE_PER_PROCESS)
    """File with a list of images to exclude, as written by `check --write-exclude`; none if not given."""
    max_bad_fraction: Annotated[float, Range(0, 1)] = field(default=0.01, metadata=FREE_PER_PROCESS)
    """Largest tolerated fraction of unreadable images in a split, 0 to 1; if there are more, the run stops. One
    unreadable image is always tolerated."""
    streaming: bool = False
    """Read a Hub dataset, parquet files or WebDataset shards sequentially, without copying them to disk; requires an
    evaluation split."""
    shuffle_block: Annotated[int, Range(1, 10_000_000)] = 1000
    """With --streaming: number of samples to hold in memory and shuffle, summed over all lanes; each lane holds at
    least one row group."""
    lanes: Annotated[int, Range(1, 1 << 20)] | None = None
    """With --streaming: number of lanes (parts of the stream that are read in parallel, each by a single worker); it
    must divide the batch size. If not given, a number up to 64 is chosen that suits the batch size and the length of
    the stream."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.test_fraction and self.test_split is not None:
            raise RequestError(
                f"{setting('test_fraction', self.test_fraction)} and {setting('test_split', self.test_split)} are "
                "mutually exclusive; omit one of them"
            )
        if self.lanes is not None and not self.streaming:
            raise RequestError(f"{setting('lanes', self.lanes)} needs {setting('streaming', True)}")
        self._check_folds()

    def _check_folds(self) -> None:
        if self.fold is not None and (self.folds is None or self.fold > self.folds):
            what = f": there are only {self.folds} folds" if self.folds else f" needs {setting('folds')}"
            raise RequestError(f"{setting('fold', self.fold)}{what}")
        if self.folds is None:
            return
        default = {field.name: field.default for field in fields(self)}
        for name in ("streaming", "eval_split", "eval_fraction", "test_fraction"):
            if getattr(self, name) != default[name]:
                raise RequestError(
                    f"{setting(name, getattr(self, name))} cannot be combined with {setting('folds', self.folds)}, "
                    "which evaluates every image of the training split once; omit one of them"
                    + (f" (to test the model of each fold, use {setting('test_split')})" if name[0] in "et" else "")
                )
