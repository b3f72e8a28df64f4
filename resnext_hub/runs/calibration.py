"""The images that an int8 model is calibrated and evaluated on."""

import dataclasses

import numpy as np
import torch

from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.sources import public_name
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError, setting
from resnext_hub.export.int8 import CALIBRATION_IMAGES, Int8
from resnext_hub.models.lookup import LoadedModel
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.existing import read_config
from resnext_hub.text import listing, printable
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.feed import evaluation_samples


def prepare_int8(model: LoadedModel, dataset: str | None, max_drop: float) -> Int8:
    """Load the images that an int8 model is calibrated and evaluated on.

    Args:
        model: The model.
        dataset: A dataset as for training, with the classes of the model; if not given, the dataset of the run that
            trained the model.
        max_drop: Largest acceptable drop of top-1 accuracy, in percentage points.

    Raises:
        RequestError: If there is no dataset, its classes differ, or none of its images is readable.
    """
    if model.thresholds is not None:
        raise RequestError(
            f"{setting('int8', True)} needs exactly one label per image, but this model predicts several; export in "
            "float32"
        )
    settings = read_config(RunFolder(model.folder.parent)) if model.folder is not None else {}
    if dataset is not None:
        data = DataConfig(dataset=dataset)
    elif settings:
        data = TrainConfig.from_flat(settings).data
    else:
        raise RequestError(
            f"{setting('int8', True)} needs {setting('calibration')}, a dataset for calibration and for measuring "
            "accuracy"
        )
    splits = load_splits(data)
    if splits.label_names != model.label_names:
        raise RequestError(
            f"{setting('calibration', public_name(data.dataset))} has the classes "
            f"{listing(splits.label_names)}; expected those of the model, {listing(model.label_names)}"
        )
    train = splits.train
    if isinstance(train, IndexedImages):  # evenly spaced, because images of a folder are ordered by class
        chosen = np.linspace(0, len(train) - 1, min(CALIBRATION_IMAGES, len(train))).round().astype(int)
        train = dataclasses.replace(train, indices=train.indices[chosen], labels=train.labels[chosen])
    images, batches = 0, []
    for batch in evaluation_samples(train, model.input).batches(25, 0, 1, 0, False):
        unreadable = torch.tensor([entry.index for entry in batch.unreadable], dtype=torch.int64)
        batches.append(batch.images[~torch.isin(batch.indices, unreadable)])
        images += len(batches[-1])
        if images >= CALIBRATION_IMAGES:
            break
    if images == 0:
        raise RequestError(
            f"none of the training images of {printable(public_name(data.dataset))} is readable; choose another "
            f"{setting('calibration')} dataset"
        )
    return Int8(
        calibration=torch.cat(batches)[:CALIBRATION_IMAGES],
        samples=evaluation_samples(splits.eval, model.input),
        max_drop=max_drop,
    )
