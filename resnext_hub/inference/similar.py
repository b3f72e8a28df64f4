"""Find the most similar images: exact search by the cosine of embeddings."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.files import require_regular, sha256_of
from resnext_hub.inference.inputs import ImageInput
from resnext_hub.models.lookup import local_name
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier

IDENTITY = "resnext_hub"
"""Key of the metadata of a parquet file with embeddings; its value is JSON, see `identity_of`."""

_WAY_OUT = "write the file again with `resnext-hub predict MODEL IMAGES --embed FILE`"


@dataclass(frozen=True)
class Match:
    """An image, and the cosine similarity of its embedding to that of the query image, -1 to 1."""

    image: ImageInput
    similarity: float


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Images with their embeddings."""

    images: Sequence[ImageInput]
    vectors: np.ndarray
    """`(N, features)` float32."""

    def nearest(self, vector: np.ndarray, top: int) -> list[Match]:
        """Return the images whose embeddings have the greatest cosine with a vector, the first of equal ones first.

        Args:
            vector: An embedding, `(features,)`.
            top: Number of images to return.
        """
        norms = np.sqrt(np.einsum("nd,nd->n", self.vectors, self.vectors)) * np.linalg.norm(vector)
        cosines = (self.vectors @ vector) / np.maximum(norms, np.finfo(np.float32).tiny)
        best = np.arange(len(cosines))
        if top < len(cosines):
            least = np.partition(cosines, -top)[-top]
            best = np.flatnonzero(cosines >= least)
        best = best[np.argsort(-cosines[best], kind="stable")][:top]
        return [Match(self.images[index], float(cosines[index])) for index in best.tolist()]


def identity_of(classifier: "Classifier") -> dict[str, Any]:
    """Return what embeddings depend on: the weights and the preprocessing, and a name for messages."""
    source = classifier.source
    assert source.saved.weights is not None
    return {
        "model": printable(local_name(classifier.folder) if classifier.folder else source.requested),
        "weights": sha256_of(source.saved.weights),
        "input": json.loads(json.dumps(classifier.input.to_timm())),
    }


def read_embeddings(file: Path, classifier: "Classifier") -> Embeddings:
    """Read what `predict --embed` wrote with the same model; images that were unreadable are left out.

    Raises:
        RequestError: If it is another file, or the embeddings of another model.
    """
    import pyarrow
    from pyarrow import parquet

    where = printable(file)
    try:
        require_regular(file)
        schema = parquet.read_schema(file)
        stated = json.loads((schema.metadata or {}).get(IDENTITY.encode(), b"null"))
        if not isinstance(stated, dict):
            raise RequestError(f"{where} does not record which model computed its embeddings; {_WAY_OUT}")
        found = identity_of(classifier)
        for what in ("weights", "input"):
            if stated.get(what) != found[what]:
                raise RequestError(
                    f"{where} contains embeddings of {_named(stated)}, but the model is {_named(found)}, with "
                    f"different {'weights' if what == 'weights' else 'preprocessing'}; use the model that computed "
                    f"them, or {_WAY_OUT}"
                )
        table = parquet.read_table(file, columns=["path", "embedding"])
        table = table.filter(table["embedding"].is_valid())
        flat = pyarrow.concat_arrays([chunk.flatten() for chunk in table["embedding"].chunks] or [pyarrow.array([])])
        # of a file that was changed by hand, the number of features or a value may be wrong
        model: Any = classifier.model
        vectors = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        vectors = vectors.reshape(len(table), getattr(model, "head_hidden_size", model.num_features))
        if not np.isfinite(vectors).all():
            raise ValueError("an embedding contains values that are not finite")
        images = table["path"].to_pylist()
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{where} cannot be read: {one_line(error)}; {_WAY_OUT}") from error
    return Embeddings(images, vectors)


def _named(identity: dict[str, Any]) -> str:
    return f"{printable(identity.get('model'))[:120]} (SHA-256 {printable(identity.get('weights'))[:12]})"


def without_itself(matches: Sequence[Match], image: ImageInput, top: int) -> list[Match]:
    """Return matches without the file that was searched for."""
    if not isinstance(image, (str, os.PathLike)):
        return list(matches[:top])
    own = os.path.realpath(image)
    others = [
        match
        for match in matches
        if not (isinstance(match.image, (str, os.PathLike)) and os.path.realpath(match.image) == own)
    ]
    return others[:top]


def require_top(top: object) -> None:
    """Raise RequestError unless a number of images is a whole number of at least 1."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise RequestError(f"{setting('top', top)}: expected a whole number of at least 1")
