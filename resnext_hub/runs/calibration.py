"""The images that int8 is calibrated on and judged by."""

import dataclasses

import numpy as np
import torch

from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError
from resnext_hub.export.runtime import CALIBRATION_IMAGES, Int8
from resnext_hub.models.lookup import LoadedModel
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.existing import read_config
from resnext_hub.text import listing, printable
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.feed import evaluation_samples


def prepare_int8(model: LoadedModel, dataset: str | None, max_drop: float) -> Int8:
    """Read the images that int8 is calibrated on and judged by.

    Args:
        model: The network.
        dataset: A dataset as for training, of the network's classes; if not given, that of the run whose model it is.
        max_drop: Points of top-1 accuracy that may be lost.

    Raises:
        RequestError: If there is no dataset, or it has other classes.
    """
    settings = read_config(RunFolder(model.folder.parent)) if model.folder is not None else {}
    if dataset is not None:
        data = DataConfig(dataset=dataset)
    elif settings:
        data = TrainConfig.from_flat(settings).data
    else:
        raise RequestError("--int8 needs --calibration, a dataset to calibrate on and to measure its accuracy by")
    splits = load_splits(data)
    if splits.label_names != model.label_names:
        raise RequestError(
            f"--calibration {data.dataset} has the classes {listing(splits.label_names)}; expected the network's, "
            f"{listing(model.label_names)}"
        )
    train = splits.train
    if isinstance(train, IndexedImages):  # some from everywhere, as a folder's come class by class
        some = np.linspace(0, len(train) - 1, min(CALIBRATION_IMAGES, len(train))).round().astype(int)
        train = dataclasses.replace(train, indices=train.indices[some], labels=train.labels[some])
    images, batches = 0, []
    for batch in evaluation_samples(train, model.input).batches(25, 0, 1, 0, False):
        unreadable = torch.tensor([entry.index for entry in batch.unreadable], dtype=torch.int64)
        batches.append(batch.images[~torch.isin(batch.indices, unreadable)])
        images += len(batches[-1])
        if images >= CALIBRATION_IMAGES:
            break
    if images == 0:
        raise RequestError(f"none of the images of {printable(data.dataset)} can be read to calibrate on")
    return Int8(
        calibration=torch.cat(batches)[:CALIBRATION_IMAGES],
        samples=evaluation_samples(splits.eval, model.input),
        max_drop=max_drop,
    )
