"""Images of a table are read by index, at a cost that does not depend on how the table is stored."""

import pickle
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets.table import InMemoryTable

from resnext_hub.data.images import IndexedImages


class CountedTable(InMemoryTable):
    """A table in memory that counts how often a column is taken from it, which takes time for each of its chunks."""

    taken = 0

    def column(self, *arguments: Any, **settings: Any) -> Any:
        """Count, and return the column."""
        type(self).taken += 1
        return super().column(*arguments, **settings)


def images_in(chunks: int) -> IndexedImages:
    """Return images in a table of chunks of three rows."""
    parts = []
    for chunk in range(chunks):
        names = pyarrow.array([f"{chunk}-{row}" for row in range(3)])
        struct = pyarrow.StructArray.from_arrays([pyarrow.nulls(3, pyarrow.binary()), names], ["bytes", "path"])
        parts.append(pyarrow.table({"image": struct}))
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = CountedTable(pyarrow.concat_tables(parts))
    rows = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="x")
    return IndexedImages(rows, "image", np.arange(len(rows))[::-1].copy(), np.zeros(len(rows), dtype=np.int64))


def test_a_row_is_read_without_looking_at_all_chunks() -> None:
    images = images_in(chunks=40)
    CountedTable.taken = 0
    names = [images.row(index)["path"] for index in range(len(images))]
    assert names == [f"{chunk}-{row}" for chunk in range(40) for row in range(3)][::-1]
    assert CountedTable.taken <= 1


def test_what_was_read_is_not_sent_to_workers_a_second_time() -> None:
    images = images_in(chunks=4)
    before = len(pickle.dumps(images))
    images.row(0)
    assert len(pickle.dumps(images)) == before
    assert pickle.loads(pickle.dumps(images)).row(2) == images.row(2)
