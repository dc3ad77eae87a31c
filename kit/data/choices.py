"""The words that say how scans are prepared; `kit.data.preprocess.Preparation` says what they mean."""

from typing import Literal

Registration = Literal["none", "rigid", "affine"]
Mask = Literal["auto", "given", "nonzero", "deepbet", "hd-bet", "mri_synthstrip"]
BiasCorrection = Literal["none", "n4"]
Intensity = Literal["zscore", "whitematter"]
OrientationUnknown = Literal["refuse", "assume_ras"]
Allowed = Literal["registration", "mask", "bias_correction"]  # what may differ between preparations, if that is meant
# QC metrics beyond whose limits a scan is none to learn from; see `kit.data.quality`.
UNUSABLE = ("template_similarity", "contrast", "grey_levels")
