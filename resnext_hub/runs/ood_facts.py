"""Measure the score of out-of-distribution images of a run on images of other datasets that scikit-learn contains."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from resnext_hub.data.sources.digits import BUNDLED
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.facts import OodFacts
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.views import logits_and_features
from resnext_hub.training.ood import FittedOod

IMAGES = 250
"""Images of each dataset."""


def ood_facts(
    fitted: FittedOod, model: nn.Module, input: InputConfig, dataset_id: str, batch_size: int
) -> list[OodFacts]:
    """Return how well a score tells the images of other datasets from held-out ones.

    Args:
        fitted: The score.
        model: The published model.
        input: Its input.
        dataset_id: The dataset of the run, which is not compared with itself.
        batch_size: Images per forward pass.
    """
    others = {"crops of two photographs (scikit-learn's sample images)": _crops()}
    if dataset_id != BUNDLED:
        others = {"scikit-learn's handwritten digits": _digits()} | others
    answers = {name: _answers(fitted, model, input, images, batch_size) for name, images in others.items()}
    return [_measure(name, fitted, *found) for name, found in answers.items()]


def _measure(name: str, fitted: FittedOod, scores: np.ndarray, certainties: np.ndarray) -> OodFacts:
    from sklearn.metrics import roc_auc_score

    unlike = np.repeat([0, 1], [len(fitted.held_out), len(scores)])
    pairs = (np.concatenate([fitted.held_out, scores]), -np.concatenate([fitted.certainties, certainties]))
    auroc, plain = (float(roc_auc_score(unlike, values)) for values in pairs)
    return OodFacts(
        dataset=name, images=len(scores), auroc=auroc, max_softmax_auroc=plain, flagged=int((scores > 0).sum())
    )


@torch.inference_mode()
def _answers(
    fitted: FittedOod, model: nn.Module, input: InputConfig, images: list[Image.Image], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and the largest probabilities of images, `(N,)` each."""
    transform, score = EvalTransform(input), fitted.score.cpu()
    device = next(model.parameters()).device
    scores, certainties = [], []
    for start in range(0, len(images), batch_size):
        pixels = torch.stack([transform(image.convert(input.mode)) for image in images[start : start + batch_size]])
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        logits, features = logits_and_features(model, pixels)
        scores.append(score(logits.cpu(), features.cpu()))
        certainties.append(logits.softmax(dim=1).amax(dim=1).cpu())
    return torch.cat(scores).numpy(), torch.cat(certainties).numpy()


def _digits() -> list[Image.Image]:
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images[:IMAGES] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(pixels) for pixels in images]


def _crops() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    found = []
    for index in range(IMAGES):
        pixels = photographs[index % len(photographs)]
        side = int(generator.integers(32, 320))
        top, left = (int(generator.integers(0, length - side)) for length in pixels.shape[:2])
        found.append(Image.fromarray(pixels[top : top + side, left : left + side]))
    return found
