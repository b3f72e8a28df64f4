"""The bundled dataset: scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from resnext_hub.data.sources.source import OpenDataset

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

BUNDLED = "digits"
"""Name of the bundled dataset."""


class BundledDigits:
    """The bundled digits, which need no download."""

    def matches(self, request: "Request") -> bool:
        """Return whether the bundled digits are requested."""
        return request.is_bundled

    def open(self, request: "Request") -> OpenDataset:
        """Open them as one split, from which an evaluation split is held out."""
        request.require_no_streaming()
        return OpenDataset(tables={"train": load_digits_table()})


def load_digits_table() -> "datasets.Dataset":
    """Return scikit-learn's digits as PNG images, scaled from 0..16 to 0..255."""
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
