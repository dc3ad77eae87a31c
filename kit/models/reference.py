"""A model's training features as a Gaussian, and how far another scan lies from them.

`reference.safetensors` lies beside an encoder or a fine-tuned model. The distance is the Mahalanobis distance, which
Lee et al. 2018 (arXiv 1807.03888) use to detect out-of-distribution inputs. The covariance is shrunk by the
Ledoit-Wolf method, since there may be fewer scans than features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save
from sklearn.covariance import LedoitWolf

from kit.runs import write_whole

FILE = "reference.safetensors"
SCANS = 1000  # most training scans that the Gaussian is fitted to
LEAST = 19  # fewest validation scans with which the p-value can be as low as 5 %
OUTSIDE = 0.05  # a scan with a p-value up to this is called outside


class Reference(NamedTuple):
    """Summary of the training features.

    Attributes:
        mean, sd: (features,) float64; sd is 1 for a feature that never varied.
        precision: (features, features) float64, inverse covariance of the standardised features.
        validation: (scans,) float64, distances of the validation scans.
    """

    mean: np.ndarray
    sd: np.ndarray
    precision: np.ndarray
    validation: np.ndarray

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distances: (scans, features) -> (scans,), without a unit; compare them with validation scans'."""
        scaled = (np.asarray(features, np.float64) - self.mean) / self.sd
        return np.sqrt(np.einsum("nf,fg,ng->n", scaled, self.precision, scaled))

    def at_least_as_far(self, features: np.ndarray) -> np.ndarray:
        """Conformal p-values, small for scans unlike the training scans: (scans, features) -> (scans,).

        The share of validation scans at least as far from the training scans, counting the scan itself.
        """
        farther = (self.validation >= self.distances(features)[:, None]).sum(1)
        return (1 + farther) / (1 + len(self.validation))


def fit_reference(learned: np.ndarray, validation: np.ndarray) -> Reference:
    """Fit the Gaussian to a model's training features.

    Args:
        learned: (scans, features) of at least two training scans; fitted to a single one, all distances are 0.
        validation: (scans, features) of validation scans from the same population; if empty, all p-values are 1.
    """
    learned = np.asarray(learned, np.float64)
    mean, sd = learned.mean(0), learned.std(0)
    sd[sd == 0] = 1.0
    precision = LedoitWolf(assume_centered=True).fit((learned - mean) / sd).precision_
    reference = Reference(mean, sd, precision, np.empty(0))
    return reference._replace(validation=reference.distances(np.reshape(validation, (-1, len(mean)))))


def save_reference(folder: Path, reference: Reference) -> None:
    """Write `reference.safetensors`."""
    arrays = {name: np.ascontiguousarray(value) for name, value in reference._asdict().items()}
    write_whole(folder / FILE, lambda aside: aside.write_bytes(save(arrays)))


def read_reference(model: Path) -> Reference | None:
    """Read the reference of a run of the kit, given its folder or its encoder.safetensors; None if there is none.

    A file of another name may lie beside the reference of another encoder.
    """
    path = (model.parent if model.name == "encoder.safetensors" else model) / FILE
    return Reference(**load_file(path)) if path.is_file() else None
