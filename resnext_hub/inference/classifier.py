"""Load a trained classifier: a model with its preprocessing and class names, ready to classify images."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from resnext_hub.errors import RequestError, setting
from resnext_hub.models.fetch import check_revision
from resnext_hub.models.lookup import LoadedModel, find_classifier, find_on_hub
from resnext_hub.models.views import TEST_TIME_AUGMENTATIONS
from resnext_hub.settings import shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from resnext_hub.export.int8 import Int8
    from resnext_hub.export.runtime import ExportedFile, FormatName
    from resnext_hub.inference.inputs import ImageInput
    from resnext_hub.inference.prediction import Prediction, Unread
    from resnext_hub.inference.similar import Match
    from resnext_hub.kernels.widths import Merge


@dataclass(frozen=True, eq=False)
class Classifier(LoadedModel):
    """A model with its preprocessing and class names; call it with images to get probabilities.

        classifier = resnext_hub.load("runs/photos-resnext_g32")
        probabilities = classifier(["cat.jpg", pil_image, array])  # (3, classes)

    `dataclasses.replace(classifier, temperature=1.5)` returns a classifier with a different temperature; `tta="flip"`
    or `tta="none"` turns test-time augmentation on or off. By default, it is on if the evaluation of the run used it.

    Raises:
        RequestError: If the temperature is not a positive number, or there is no such test-time augmentation.
    """

    def __post_init__(self) -> None:
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise RequestError(f"temperature={shown(repr(value))}: expected a positive number")
        if self.tta not in TEST_TIME_AUGMENTATIONS:
            raise RequestError(f"{setting('tta', shown(self.tta))}: expected {' or '.join(TEST_TIME_AUGMENTATIONS)}")

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have any number of labels, each with its own probability."""
        return self.thresholds is not None

    @property
    def device(self) -> torch.device:
        """Device of the forward passes: the example's for an optimized model, else the accelerator if there is one."""
        from resnext_hub.inference.optimize import OptimizedModel
        from resnext_hub.machine import device_type

        return self.model.device if isinstance(self.model, OptimizedModel) else torch.device(device_type())

    @property
    def transform(self) -> "Callable[[Image], torch.Tensor]":
        """timm's evaluation transform: maps a PIL image in mode RGB (or L) to the model's input `(C, H, W)`."""
        import timm

        transform: Callable[[Image], torch.Tensor] = timm.data.create_transform(
            **self.input.to_timm(), is_training=False
        )
        return transform

    def __call__(self, images: "ImageInput | Sequence[ImageInput]", *, batch_size: int = 32) -> torch.Tensor:
        """Return the probabilities of images, `(N, classes)` float64 on the CPU.

        They sum up to 1 if each image has exactly one class, and are independent if it can have several labels.

        Args:
            images: An image or a list of them: paths, encoded bytes, PIL images, or uint8 arrays `(H, W)` or
                `(H, W, C)`.
            batch_size: Batch size of the forward passes.

        Raises:
            RequestError: If an image is unreadable, or an argument is invalid.
        """
        from resnext_hub.inference.prediction import probabilities

        listed = _listed(images)
        if not listed:
            return torch.empty(0, len(self.label_names), dtype=torch.float64)
        return _stacked(probabilities(self, listed, batch_size=batch_size, device=self.device))

    def embed(self, images: "ImageInput | Sequence[ImageInput]", *, batch_size: int = 32) -> torch.Tensor:
        """Return the embeddings of images, the inputs of the classifier layer: `(N, features)` float32 on the CPU.

        Args:
            images: An image or a list of images, as when calling the classifier.
            batch_size: Batch size of the forward passes.

        Raises:
            RequestError: If an image is unreadable, an argument is invalid, or the model was optimized.
        """
        from resnext_hub.inference.prediction import embeddings

        return _stacked(embeddings(self, _listed(images), batch_size=batch_size, device=self.device))

    def similar(
        self,
        image: "ImageInput",
        among: "Sequence[ImageInput] | str | os.PathLike[str]",
        *,
        top: int = 10,
        batch_size: int = 32,
    ) -> "list[Match]":
        """Return the images that are most similar to an image, by the cosine similarity of their embeddings.

        Args:
            image: The image.
            among: Images, or a parquet file that `resnext-hub predict --embed` wrote with this model. If the file lists
                the path of the image itself, that row is ignored.
            top: Number of images to return.
            batch_size: Batch size of the forward passes.

        Raises:
            RequestError: If an image is unreadable, an argument is invalid, the file contains embeddings of a different
                model, or the model was optimized.
        """
        from resnext_hub.inference.similar import Embeddings, read_embeddings, require_top, without_itself

        require_top(top)
        vector = self.embed(image, batch_size=batch_size)[0].numpy()
        if isinstance(among, (str, os.PathLike)):
            found = read_embeddings(Path(among), self)
        else:
            found = Embeddings(among, self.embed(among, batch_size=batch_size).numpy().reshape(-1, len(vector)))
        return without_itself(found.nearest(vector, top + 1), image, top)

    def explain(
        self,
        images: "ImageInput | Sequence[ImageInput]",
        label: int | str | None = None,
        *,
        batch_size: int = 32,
    ) -> torch.Tensor:
        """Return heat maps of the regions that contribute most to a class, by Grad-CAM: `(N, H, W)` float32, 0 to 1.

        The heat maps are on the CPU and have the size of the model's input, so they match the images after resizing and
        cropping.

        Args:
            images: An image or a list of images, as when calling the classifier.
            label: The class, by name or index; if not given, the most probable class of each image.
            batch_size: Batch size of the forward passes.

        Raises:
            RequestError: If an image is unreadable, an argument is invalid, or the model was optimized or is not a
                convolutional model.
        """
        from resnext_hub.inference.explain import explain

        found = explain(self, _listed(images), label=label, batch_size=batch_size, device=self.device)
        return _stacked(entry if isinstance(entry, str) else torch.from_numpy(entry.heat) for entry in found)

    def predict(
        self,
        images: "ImageInput | Sequence[ImageInput]",
        *,
        top: int | None = None,
        threshold: float | None = None,
        accept_precision: float | None = None,
        batch_size: int = 32,
    ) -> "list[Prediction | Unread]":
        """Return the most probable classes of each image, or the reason why the image is unreadable.

        Args:
            images: An image or a list of images, as when calling the classifier.
            top: Maximum number of classes to return for each image; if not given, only the most probable class or, if
                an image can have several labels, all labels that reach their thresholds.
            threshold: Minimum probability of the returned classes, 0 to 1; if an image can have several labels, this
                replaces their thresholds.
            accept_precision: Fraction of the accepted answers that should be correct, between 0 and 1; answers that are
                not probable enough for this precision are marked as unsure.
            batch_size: Batch size of the forward passes.

        Raises:
            RequestError: If an argument is invalid.
        """
        from resnext_hub.inference.prediction import predict

        found = predict(
            self,
            _listed(images),
            top=top,
            threshold=threshold,
            accept_precision=accept_precision,
            batch_size=batch_size,
            device=self.device,
        )
        return list(found)

    def optimize(
        self,
        images: "ImageInput | Sequence[ImageInput]",
        *,
        engine: Literal["torch", "openvino"] = "torch",
        dtype: torch.dtype | None = None,
        merge: "Merge" = "measure",
        compile: bool = True,
        objective: Literal["throughput", "latency"] = "throughput",
    ) -> "Classifier":
        """Return this classifier with a faster model; see `resnext_hub.optimize`.

        Args:
            images: Representative images, on which time and error are measured.
            engine: `torch`, or `openvino` on a CPU.
            dtype: bfloat16 or float32; None chooses bfloat16 if it is fast on the device.
            merge: How to merge groups; see `resnext_hub.optimize`.
            compile: Whether to compile the model, with torch.
            objective: `throughput` optimizes for batches of that many images, `latency` for single images.

        Returns:
            A new classifier; its `model.report` contains the speedup and the error.

        Raises:
            RequestError: If an image is unreadable, or the model cannot be optimized or already is.
        """
        from resnext_hub.inference.inputs import prepare
        from resnext_hub.inference.optimize import optimize

        device = torch.device("cpu") if engine == "openvino" else self.device
        example = prepare(self, _listed(images)).to(device)
        fast = optimize(
            self.model.to(device),
            example,
            engine=engine,
            dtype=dtype,
            merge=merge,
            compile=compile,
            objective=objective,
        )
        return replace(self, model=fast)

    def export(
        self,
        format: "FormatName",
        path: "str | os.PathLike[str] | None" = None,
        *,
        merge: Literal["measure", "off"] | int = "off",
        int8: "Int8 | None" = None,
        raw: bool = False,
    ) -> "ExportedFile":
        """Export to a file that maps images to probabilities in another runtime, and check the file with that runtime.

        Args:
            format: `onnx`, `openvino` or `torch`; see `resnext_hub.export.runtime.export`.
            path: The output file; next to the model folder if not given.
            merge: Width to which groups are merged, `measure` (with OpenVINO) or `off`.
            int8: Calibration and evaluation images to quantize with; float32 if not given.
            raw: Export only the model, which maps normalized images to logits.

        Raises:
            RequestError: If an argument is invalid, the file cannot be written, or the model was optimized.
            RunError: If the export fails, or the runtime's logits differ; no file is left.
        """
        from resnext_hub.export.runtime import export
        from resnext_hub.inference.optimize import OptimizedModel

        if format not in ("onnx", "openvino", "torch"):
            raise RequestError(f"{setting('format', shown(format))}: expected onnx, openvino or torch")
        if isinstance(self.model, OptimizedModel):
            raise RequestError("an optimized model cannot be exported; export the original classifier")
        self.model.cpu()
        return export(self, format, None if path is None else Path(path), merge=merge, int8=int8, raw=raw)


def load(where: "str | os.PathLike[str]", *, verify: bool = False) -> Classifier:
    """Load a classifier.

    Args:
        where: A run folder; a folder with config.json and model.safetensors; `hf-hub:owner/name[@revision]`; or the
            name of a timm model with released weights, such as `resnext_g32`.
        verify: Verify the files of a repository on the Hub against the hashes that the Hub lists; see `from_hub`.

    Raises:
        RequestError: If there is no such model, or it cannot be loaded.
        RunError: If the Hub cannot be reached, or the files differ from those that it lists.
    """
    if not isinstance(where, (str, os.PathLike)):
        raise RequestError(f"where={shown(repr(where))}: expected a folder, hf-hub:owner/name or a model name")
    return _classifier(find_classifier(os.fsdecode(where), verify=verify).load())


def from_hub(repo_id: str, *, revision: str | None = None, verify: bool = True) -> Classifier:
    """Download a classifier from the Hub, verify its files, and load it.

    Args:
        repo_id: `owner/name` of a repository in timm's layout.
        revision: Branch, tag or commit; main if not given. A branch loads its current commit.
        verify: Verify the files against the hashes that the Hub lists. If False, a cached copy can be loaded without
            contacting the Hub.

    Raises:
        RequestError: If the repository does not exist, access is denied, or the repository contains no safetensors
            file.
        RunError: If the Hub cannot be reached, or the files differ from those that it lists.
    """
    if not isinstance(repo_id, str) or not repo_id.strip():
        raise RequestError(f"repo_id={shown(repr(repo_id))} is not a Hub ID of the form owner/name")
    where = shown(repo_id)
    if revision is not None:
        check_revision(f"{where}: revision={shown(repr(revision))}", revision)
    return _classifier(find_on_hub(repo_id, revision, pretrained=True, where=where, verify=verify).load())


def _classifier(loaded: LoadedModel) -> Classifier:
    return Classifier(**vars(loaded))


def _stacked(rows: "Iterable[torch.Tensor | str]") -> torch.Tensor:
    """Return the results for images as one tensor.

    Raises:
        RequestError: If an image is unreadable.
    """
    found = []
    for index, row in enumerate(rows):
        if isinstance(row, str):
            raise RequestError(f"image {index} is unreadable: {row}")
        found.append(row)
    return torch.stack(found) if found else torch.empty(0)


def _listed(images: Any) -> "Sequence[ImageInput]":
    """Return a single image as a sequence of one."""
    return images if isinstance(images, (list, tuple)) else [images]
