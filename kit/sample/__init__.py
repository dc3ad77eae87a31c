"""The procedural sample cohort: scans drawn by seed from the ICBM152 maps, with effects of known places.

No person was scanned. In reading order:

- ``atlas``     the template's tissue maps and the distance to its ventricles
- ``anatomy``   one head: its shape, and what age, sex and disease change
- ``scan``      one scan of a head: pose, contrast, bias field, resolution, noise
- ``cohort``    who takes part, the BIDS folder, the cache
"""

from kit.sample.anatomy import GENERATOR_VERSION
from kit.sample.cohort import draw_participants, draw_travelling, effect_masks, sample_cohort, write_effects
from kit.sample.scan import ProceduralScan, make_scan

__all__ = [
    "GENERATOR_VERSION", "ProceduralScan", "draw_participants", "draw_travelling", "effect_masks", "make_scan",
    "sample_cohort", "write_effects",
]
