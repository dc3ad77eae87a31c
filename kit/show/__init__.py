"""Figures, tables and the explorer's widgets. Figures are returned; pyplot neither shows nor keeps them.

- `planes`: cut slices the right way up; convert millimetres to voxels; scale grey levels
- `figure`: an empty figure with a title and a note ("procedural data"); figures as PNG
- `slices`: a scan in three planes with an outline; many scans; views beside their original; a
  transform at several strengths
- `cohort_figures`: a cohort by dataset, split and label, and what became of its scans
- `quality_figures`: prepared scans with the template's outline; quality metrics by site
- `curves`: losses, learning rate and seconds of a training run
- `comparison`: the benchmark: forest plot of differences, tables, summary, label efficiency
- `predictions`: ROC, calibration, scatter, confusion, worst errors; embeddings in two dimensions
- `wording`: shared wording: readable names, units, a score with its interval
- `live`: a figure that follows a run while it trains
- `explorer`: the interactive explorer of augmentations
- `recipe_controls`: its transforms, with switches and sliders
- `saliency_figures`: maps over scans, as mosaics, by group, by region, and in an interactive viewer
- `similarity`: similarity of two views in an encoder's features, drawn beside their grey levels
"""
