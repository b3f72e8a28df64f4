"""A score of how unlike the training images an image is: for out-of-distribution (OOD) images, of none of the classes.

It is the sum of two standardized scores that fail on different images. One is the energy of the logits (Liu et al.,
2020, arXiv 2010.03759). The other is the logarithm of the squared distance of the features from the nearest class mean
(Lee et al., 2018, arXiv 1807.03888), with a covariance to which as much of the identity is added as it has itself: the
directions with little variance must not decide alone.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import require_regular, sha256_of

OOD = "ood.safetensors"
"""Name of the file in a model folder."""

_DIMENSIONS = {"mean": 1, "directions": 2, "shrink": 1, "centers": 2, "standard": 1}
"""Tensors of the file with their numbers of dimensions."""


class OodScore(nn.Module):
    """Maps logits `(N, classes)` and features `(N, F)` to scores `(N,)`.

    A score above 0 is higher than those of 95 % of the held-out images that it was fitted on.

    Args:
        mean: Mean of the features, `(F,)`.
        directions: Orthonormal directions in which classes vary most, `(k, F)`.
        shrink: By how much each of them is shortened, `(k,)`, 0 to 1.
        centers: Class means, shifted and shortened in the same way, `(classes, F)`.
        standard: Median and spread of the logarithm of the squared distance, median and spread of the energy, and what
            to subtract from the sum of both; `(5,)`.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    shrink: torch.Tensor
    centers: torch.Tensor
    standard: torch.Tensor

    def __init__(
        self,
        *,
        mean: torch.Tensor,
        directions: torch.Tensor,
        shrink: torch.Tensor,
        centers: torch.Tensor,
        standard: torch.Tensor,
    ) -> None:
        super().__init__()
        tensors = {"mean": mean, "directions": directions, "shrink": shrink, "centers": centers, "standard": standard}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float())

    def forward(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        distance, energy = self.parts(logits, features)
        median, spread, energy_median, energy_spread, limit = self.standard.unbind()
        return (distance - median) / spread + (energy - energy_median) / energy_spread - limit

    def parts(self, logits: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logarithm of the squared distance from the nearest class mean, and the energy; `(N,)` each."""
        points = self.shorten(features - self.mean)
        products = 2 * points @ self.centers.T
        squares = points.square().sum(dim=1, keepdim=True) - products + self.centers.square().sum(dim=1)
        largest = logits.amax(dim=1)
        energy = -(largest + (logits - largest[:, None]).exp().sum(dim=1).log())
        return squares.amin(dim=1).clamp(min=1e-12).log(), energy

    def shorten(self, shifted: torch.Tensor) -> torch.Tensor:
        """Return vectors `(N, F)` with each of the directions shortened."""
        return shifted - (shifted @ self.directions.T * self.shrink) @ self.directions


def write_ood(score: OodScore, folder: Path) -> str:
    """Write the file into a model folder; return its SHA-256."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in score.state_dict().items()}, folder / OOD)
    return sha256_of(folder / OOD)


def read_ood(where: str, path: Path, sha256: str) -> OodScore:
    """Read the file of a model folder.

    Args:
        where: How the user named the model, printable; messages begin with it.
        path: The file.
        sha256: The hash that config.json states.

    Raises:
        RequestError: If the file is not the one that config.json states, or is malformed.
    """
    way_out = "restore the file, or remove it to load the model without the score"
    try:
        require_regular(path)
        if sha256_of(path) != sha256:
            raise RequestError(f"{where}: {path.name} does not match its SHA-256 in config.json; {way_out}")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{where}: {path.name} cannot be read ({one_line(error)}); {way_out}") from error
    if not _fit_together(tensors):
        raise RequestError(f"{where}: {path.name} does not contain the tensors of an OOD score; {way_out}")
    return OodScore(**tensors)


def _fit_together(tensors: dict[str, torch.Tensor]) -> bool:
    if {name: tensor.ndim for name, tensor in tensors.items()} != _DIMENSIONS:
        return False
    (features,), (count,) = tensors["mean"].shape, tensors["shrink"].shape
    return (
        tensors["directions"].shape == (count, features)
        and tensors["centers"].shape[1:] == (features,)
        and len(tensors["centers"]) > 0
        and tensors["standard"].shape == (5,)
        and all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors.values())
    )
