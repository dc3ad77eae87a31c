"""What a model has seen, as a Gaussian of its training features, and how far another scan lies from that.

`reference.safetensors` lies beside an encoder or a fine-tuned model. The distance is Mahalanobis's, as Lee et al. 2018
(arXiv 1807.03888) use it to tell what a network was not trained on; the covariance is shrunk by Ledoit and Wolf's rule,
for there may be fewer scans than features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.covariance import LedoitWolf

from kit.runs import write_whole

FILE = "reference.safetensors"
SCANS = 1000  # training scans that are enough for the Gaussian
LEAST = 19  # validation scans without which no scan can be among the farthest 5 %
OUTSIDE = 0.05  # a scan farther than all but this share of the validation scans is called outside


class Reference(NamedTuple):
    """Features of training scans, in short.

    Attributes:
        mean, sd: (features,) float64; a feature that never varied has an sd of 1.
        precision: (features, features) float64, of features less their mean, over their sd.
        validation: (scans,) float64, distances of scans that nothing was learned from.
    """

    mean: np.ndarray
    sd: np.ndarray
    precision: np.ndarray
    validation: np.ndarray

    def distances(self, features: np.ndarray) -> np.ndarray:
        """(scans, features) -> (scans,), in standard deviations."""
        scaled = (np.asarray(features, np.float64) - self.mean) / self.sd
        return np.sqrt(np.einsum("nf,fg,ng->n", scaled, self.precision, scaled))

    def at_least_as_far(self, features: np.ndarray) -> np.ndarray:
        """(scans, features) -> (scans,): a conformal p-value, small for scans unlike those that the model has seen.

        The share of validation scans at least as far from the training scans, the scan itself counted among them.
        """
        farther = (self.validation >= self.distances(features)[:, None]).sum(1)
        return (1 + farther) / (1 + len(self.validation))


def fit_reference(learned: np.ndarray, validation: np.ndarray) -> Reference:
    """Describe what a model has seen.

    Args:
        learned: (scans, features) of scans that it was trained on.
        validation: (scans, features) of scans that it was not trained on, of the same kind; may be empty.
    """
    learned = np.asarray(learned, np.float64)
    mean, sd = learned.mean(0), learned.std(0)
    sd[sd == 0] = 1.0
    precision = LedoitWolf(assume_centered=True).fit((learned - mean) / sd).precision_
    reference = Reference(mean, sd, precision, np.empty(0))
    return reference._replace(validation=reference.distances(np.reshape(validation, (-1, len(mean)))))


def save_reference(folder: Path, reference: Reference) -> None:
    """Leave `reference.safetensors`."""
    arrays = {name: np.ascontiguousarray(value) for name, value in reference._asdict().items()}
    write_whole(folder / FILE, lambda aside: save_file(arrays, aside))


def read_reference(model: Path) -> Reference | None:
    """What lies beside a model (its folder or its file), if anything does."""
    path = (model if model.is_dir() else model.parent) / FILE
    return Reference(**load_file(path)) if path.is_file() else None
