"""Published encoders: what the files of each format look like, and the record of how to use them.

Taken from their public repositories (`source`) and copies of these in November 2026. No released file was available,
only the hash and parameter names of neuro_simclr's; `unverified` lists what rests on code alone, or on less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kit.params import ARCHITECTURES
from kit.preprocess.settings import TEMPLATE_NAME
from kit.store.grid import PAPER_GRID

ANY = "any"  # value in a preparation that matches every scan; see `kit.provenance.compare`
PLAIN_HEADS = r"(fc|class_layers\.out)\."  # MONAI's classifiers


class Format(NamedTuple):
    """A file format, and what is known of the encoder in it."""

    architecture: str  # see `kit.models.encoders.build_encoder`; "": depends on the file
    objective: str
    preparation: dict[str, Any] | None  # fields of `kit.provenance.FIELDS`; None: unknown
    differences: str = ""  # between `preparation` and the published one
    unverified: str = ""
    datasets: tuple[str, ...] = ()  # that it was trained on; empty: unknown
    licence: str = "not known"
    source: str = ""
    hashes: tuple[str, ...] = ()  # sha256 of released files
    prefix: str = ""  # of the encoder's parameter names, after DataParallel's `module.`
    heads: str = "(?!)"  # regex at the start of a name: heads, outside the encoder, ignored
    unused: str = "(?!)"  # regex at the start of a name: weights in the encoder that `forward` does not use, ignored


_BOX = {"axes": "zyx", "shape": list(PAPER_GRID.shape), "spacing_mm": PAPER_GRID.spacing_mm,
        "origin_mm": list(PAPER_GRID.origin_mm), "template": TEMPLATE_NAME, "versions": ANY}
_RIGID = {**_BOX, "registration": "rigid", "bias_correction": "n4", "mask": ANY, "intensity": "zscore"}
_BRAINIAC = Format(
    architecture="brainiac", objective="simclr", preparation=_RIGID,
    differences="published: masks by HD-BET; black is the raw scan's zero, here it is the brain's darkest voxel",
    unverified="that the file loads; the box (its size is that of the repository's sample scan); axes and orientation; "
               "the projection head's names; the datasets",
    licence="non-commercial academic research only (Mass General Brigham; earlier versions of the repository: "
            "CC BY-NC 4.0)",
    source="https://github.com/AIM-KannLab/BrainIAC", prefix="backbone.", heads="",  # their loader reads nothing else
    unused=r"blocks\.\d+\.(norm_)?cross_attn\.")

PUBLISHED: dict[str, Format] = {
    "neuro_simclr": Format(
        architecture="resnet18", objective="simclr", preparation=_RIGID,
        differences="published: TurboPrep, that is N4, SynthStrip, rigid registration to ICBM152 2009c (symmetric) and "
                    "WhiteStripe, which a z-score undoes; the kit's template is 2009a in the same millimetres",
        unverified="how much other masks and the other template change the features",
        datasets=("ADNI", "AOMIC", "CoRR", "DLBS", "GSP", "HABS-HD", "MCSA", "NIFD", "PPMI", "SALD", "SOOP"),
        licence="none is stated in its repository",
        source="https://github.com/emilykaczmarek/3D-Neuro-SimCLR (release v1.0.0)",
        hashes=("f046dafe009de0cfa113a022c1ef9603d123834f217074eb86d26037e72b98f5",),
        prefix="encoder.", heads=r"projector\."),
    "brainiac": _BRAINIAC,
    "brainiac_resnet50": _BRAINIAC._replace(
        architecture="brainiac_resnet50", unused="(?!)"),
    "medicalnet": Format(
        architecture="", objective="segmentation",
        preparation={**dict.fromkeys((*_BOX, "registration", "bias_correction", "mask"), ANY), "axes": "zyx",
                     "intensity": "zscore"},
        differences="published: scans of many organs, MR and CT, neither registered nor stripped; resized to "
                    "56x448x448 by nearest neighbours, z-scored where above zero, and noise of mean 0 and SD 1 "
                    "elsewhere, which is 0 here",
        unverified="that the files load; the orientation within slices; the input size, which is that of the "
                   "repository's example; the datasets (3DSeg-8, later 23)",
        licence="MIT", source="https://github.com/Tencent/MedicalNet", heads=r"(conv_seg|fc)\."),
}
FORMATS: dict[str, Format] = {
    **PUBLISHED, **{name: Format(name, "not known", None, heads=PLAIN_HEADS) for name in ARCHITECTURES}}
