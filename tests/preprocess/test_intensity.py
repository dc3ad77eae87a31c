"""Bias fields go, to the bit the same each time; scores and the white-matter peak are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from kit.preprocess.intensity import by_white_matter, correct_bias
from kit.preprocess.nifti import ScanError
from kit.preprocess.template import template_on, tissue_on
from kit.store.grid import Grid

GRID = Grid((40, 50, 44), 4.0)


def biased() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The template at 4 mm with noise, its brain, and a smooth field of 0.7 to 1.4 over it."""
    image, mask = template_on(GRID)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in GRID.shape), indexing="ij")
    field = np.exp(0.3 * x - 0.25 * y * y + 0.15 * z).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.01, image.shape).astype(np.float32)
    return (100 * image + 3) * field + 100 * noise, mask, field


def spread(values: np.ndarray) -> float:
    return float(values.std() / values.mean())


@pytest.mark.slow
def test_n4_takes_most_of_a_bias_field_off() -> None:
    scan, mask, _ = biased()
    clean = 100 * template_on(GRID)[0] + 3
    inside = mask & (clean > 30)
    before = spread((scan / clean)[inside])
    corrected = correct_bias(scan, GRID.affine, mask)
    assert spread((corrected / clean)[inside]) < 0.6 * before  # noise alone is 0.2 of it
    assert corrected.tobytes() == correct_bias(scan, GRID.affine, mask).tobytes()


def test_n4_without_an_image_is_a_reason() -> None:
    scan, mask, _ = biased()
    with pytest.raises(ScanError, match="N4"):
        correct_bias(scan, GRID.affine, np.zeros_like(mask))


def test_n4_refuses_z_scored_scans() -> None:
    """It would take the logarithm of the brighter half alone, and divide both halves by that field."""
    scan, mask, _ = biased()
    scored = np.where(mask, (scan - np.median(scan[mask])) / scan[mask].std(), 0).astype(np.float32)
    with pytest.raises(ScanError, match="found 50% of the brain below: was the scan z-scored.*bias_correction: none"):
        correct_bias(scored, GRID.affine, mask)


def test_white_matter_peak_is_one() -> None:
    image, mask = template_on(GRID)
    white = tissue_on(GRID, "white")
    assert 100 < white.sum() * 0.064 < 700  # ml
    lesioned = 340 * image
    lesioned[20:26, 25:31, 25:31] = 20  # dark, in the white matter of one side
    out = by_white_matter(lesioned, mask, white)
    assert np.median(out[white]) == pytest.approx(1, abs=0.04)
    assert not out[~mask].any()
    np.testing.assert_allclose(out, by_white_matter(7 * lesioned, mask, white), rtol=1e-5)
    with pytest.raises(ScanError, match="white-matter peak"):
        by_white_matter(lesioned - 1000, mask, white)
