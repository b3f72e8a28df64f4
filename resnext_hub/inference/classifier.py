"""A trained classifier: a model with everything that it takes to classify images with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from resnext_hub.errors import RequestError
from resnext_hub.models.fetch import check_revision
from resnext_hub.models.lookup import LoadedModel, find_classifier, find_on_hub
from resnext_hub.settings import shown

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from resnext_hub.export.runtime import ExportedFile, FormatName, Int8
    from resnext_hub.inference.prediction import ImageInput, Prediction, Unread
    from resnext_hub.kernels.widths import Merge


@dataclass(frozen=True, eq=False)
class Classifier(LoadedModel):
    """A model with its preprocessing and class names; call it with images to get probabilities.

    classifier = resnext_hub.load("runs/photos-resnext_g32")
    probabilities = classifier(["cat.jpg", pil_image, array])  # (3, classes)
    """

    temperature: float = 1.0
    """Divides the logits before the softmax; above 1, probabilities are less confident."""

    @property
    def transform(self) -> "Callable[[Image], torch.Tensor]":
        """timm's evaluation transform: maps a PIL image in mode RGB to the model's input `(C, H, W)`."""
        import timm

        transform: Callable[[Image], torch.Tensor] = timm.data.create_transform(
            **self.input.to_timm(), is_training=False
        )
        return transform

    def __call__(self, images: "ImageInput | Sequence[ImageInput]", *, batch_size: int = 32) -> torch.Tensor:
        """Return the probabilities of images, `(N, classes)` float64 on the CPU.

        Args:
            images: An image or a sequence of them: paths, encoded bytes, PIL images or uint8 arrays `(H, W)` and
                `(H, W, C)`.
            batch_size: Shape of the forward passes.

        Raises:
            RequestError: If an image cannot be decoded.
        """
        from resnext_hub.inference.prediction import probabilities

        found = []
        for index, row in enumerate(probabilities(self, _listed(images), batch_size=batch_size)):
            if isinstance(row, str):
                raise RequestError(f"image {index} cannot be decoded: {row}")
            found.append(row)
        return torch.stack(found) if found else torch.empty(0, len(self.label_names), dtype=torch.float64)

    def predict(
        self, images: "ImageInput | Sequence[ImageInput]", *, top: int = 1, batch_size: int = 32
    ) -> "list[Prediction | Unread]":
        """Return the most probable classes of each image, or why it cannot be decoded.

        Args:
            images: An image or a sequence of them, as for calling the classifier.
            top: Number of classes for each image.
            batch_size: Shape of the forward passes.
        """
        from resnext_hub.inference.prediction import predict

        return list(predict(self, _listed(images), top=top, batch_size=batch_size))

    def optimize(
        self,
        images: "Sequence[ImageInput]",
        *,
        engine: Literal["torch", "openvino"] = "torch",
        dtype: torch.dtype | None = None,
        merge: "Merge" = "measure",
        compile: bool = True,
    ) -> "Classifier":
        """Return the same classifier with a faster model, checked against this one; see `optimize`.

        Args:
            images: Images such as will come: time and error are measured on them.
            engine: `torch`, or `openvino` on a CPU.
            dtype: bfloat16 or float32; None takes bfloat16 where the device computes it fast.
            merge: How groups are merged; see `optimize`.
            compile: Compile the model, with torch.
        """
        from resnext_hub.inference.optimize import optimize
        from resnext_hub.inference.prediction import prepare

        device = next(self.model.parameters()).device
        example = prepare(self, images).to(device)
        fast = optimize(self.model, example, engine=engine, dtype=dtype, merge=merge, compile=compile)
        return replace(self, model=fast)

    def export(
        self,
        format: "FormatName",
        path: "Path | None" = None,
        *,
        merge: Literal["measure", "off"] | int = "off",
        int8: "Int8 | None" = None,
    ) -> "ExportedFile":
        """Write the model for another runtime, checked by that runtime; see `resnext_hub.export.runtime.export`."""
        from resnext_hub.export.runtime import export

        return export(self, format, path, merge=merge, int8=int8)


def load(where: str, *, verify: bool = False) -> Classifier:
    """Load a classifier.

    Args:
        where: A run folder; a folder with config.json and model.safetensors; `hf-hub:owner/name[@revision]`; or a name
            of timm with released weights, such as `resnext_g32`.
        verify: With a repository on the Hub, compare the files with what the Hub lists for the commit; see `from_hub`.

    Raises:
        RequestError: If there is no such model, or it cannot be loaded as it is.
        RunError: If the Hub cannot be reached, or sent other bytes than it lists.
    """
    return _classifier(find_classifier(str(where), verify=verify).load())


def from_hub(repo_id: str, *, revision: str | None = None, verify: bool = True) -> Classifier:
    """Download a classifier, compare its bytes with the Hub's listing, and load it.

    Args:
        repo_id: `owner/name` of a repository that timm can load.
        revision: Branch, tag or commit; main if not given. What it points to now is what is loaded.
        verify: Compare the SHA-256 of the files with what the Hub lists. Without it a copy in the cache is enough, and
            the Hub need not be reached.

    Raises:
        RequestError: If there is no such repository, you have no access, or it has no safetensors.
        RunError: If the Hub cannot be reached, or the bytes are not those that it lists.
    """
    if not isinstance(repo_id, str) or not repo_id.strip():
        raise RequestError(f"repo_id={shown(repr(repo_id))} is not a Hub id of the form owner/name")
    where = shown(repo_id)
    if revision is not None:
        check_revision(f"{where}: revision={shown(repr(revision))}", revision)
    return _classifier(find_on_hub(repo_id, revision, pretrained=True, where=where, verify=verify).load())


def _classifier(loaded: LoadedModel) -> Classifier:
    return Classifier(loaded.model, loaded.input, loaded.label_names, loaded.source)


def _listed(images: Any) -> "Sequence[ImageInput]":
    """Return a single image as a sequence of one."""
    return images if isinstance(images, (list, tuple)) else [images]
