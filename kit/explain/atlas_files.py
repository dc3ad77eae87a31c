"""The atlases in deepmriprep's wheel: only its data files, since importing the package needs further dependencies."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from difflib import get_close_matches
from pathlib import Path

from kit.errors import KitError

WHEEL = "KIT_DEEPMRIPREP"  # environment variable: path of deepmriprep's wheel, or of the folder it was unpacked into
TEMPLATES = "deepmriprep/data/templates/"
UNSTATED = "not stated by CAT12"

# The wheel's MIT licence covers its code. Its atlases are CAT12's, by name and table; below is what CAT12 states for
# each (github.com/ChristianGaser/cat12, templates_MNI152NLin2009cAsym/*.txt), unless the entry names its source.
LICENCES = {
    "Schaefer2018": "MIT (nilearn's description of the atlas)",
    "aal3": f"{UNSTATED}; nilearn says of AAL: unknown; cite Rolls et al. 2020",
    "anatomy3": f"{UNSTATED}; cite Eickhoff et al. 2005",
    "cobra": f"{UNSTATED}; of its parts, the hippocampus is for academic, non-commercial research (TIGRLab)",
    "hammers": "academic, non-commercial research and teaching, after filling out its agreement; not for patient care",
    "ibsr": "research on segmentation; anatomical studies and published images need the holder's permission",
    "julichbrain": f"{UNSTATED}; cite Amunts et al. 2020",
    "lpba40": "LONI Research License: no commercial use",
    "mori": f"{UNSTATED}; cite Oishi et al. 2009",
    "neuromorphometrics": "CC BY-NC; credit OASIS, and Neuromorphometrics, Inc., under academic subscription",
    "suit": "CC BY-NC 3.0; cite Diedrichsen et al. 2009",
    "thalamic_nuclei": "CC BY 4.0; cite Saranathan et al. 2021",
    "thalamus": "all rights reserved, University of Lausanne 2018; cite Najdenovska et al. 2018",
}


class AtlasError(KitError, ValueError):
    """An atlas cannot be used; the message names it, what is wrong and what to do."""


def atlas_names() -> list[str]:
    """List deepmriprep's atlases; empty if it is not available. Raises AtlasError as `templates` does."""
    folder = templates()
    return [] if folder is None else sorted(path.name.removesuffix(".csv") for path in folder.iterdir()
                                            if path.name.endswith(".csv"))


def wheel_file(name: str, ending: str) -> bytes:
    """Read a file of an atlas: its labels (`.nii.gz`) or their names (`.csv`).

    Raises:
        AtlasError: deepmriprep is not available, or has no such atlas.
    """
    folder = templates()
    if folder is None:
        raise AtlasError(f"atlas deepmriprep:{name}: deepmriprep is not installed; pip install deepmriprep==0.3.0, or "
                         f"pip download --no-deps deepmriprep==0.3.0 and name the wheel in ${WHEEL}")
    if name not in (known := atlas_names()):
        near = "".join(f"; did you mean {each}?" for each in get_close_matches(name, known, 1))
        raise AtlasError(f"atlas deepmriprep:{name}: deepmriprep has {', '.join(known)}{near}")
    return (folder / f"{name}{ending}").read_bytes()


def templates() -> Path | zipfile.Path | None:
    """Find deepmriprep's data folder without importing the package; None if it is not available.

    Raises:
        AtlasError: `$KIT_DEEPMRIPREP` names neither the wheel nor a folder with the atlases.
    """
    if named := os.environ.get(WHEEL):
        if (Path(named) / TEMPLATES).is_dir():
            return Path(named) / TEMPLATES
        if not zipfile.is_zipfile(named) or not zipfile.Path(named, TEMPLATES).exists():
            raise AtlasError(f"${WHEEL} names {named}, which is neither deepmriprep's wheel nor a folder "
                             f"with {TEMPLATES}")
        return zipfile.Path(named, TEMPLATES)
    spec = importlib.util.find_spec("deepmriprep")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1] / TEMPLATES
