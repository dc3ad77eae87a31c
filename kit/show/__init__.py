"""Pictures, curves, tables and the explorer's widgets. Figures are returned, neither shown nor kept by
pyplot.

- `planes`: cut a volume the right way up; millimetres to voxels; grey levels
- `figure`: an empty figure with its title and its note ("procedural data"); figures as PNG
- `slices`: a scan in three planes with overlay and outline; many scans; views beside their original; a
  transform at several strengths
- `quality`: prepared scans under the template's outline; quality figures by site
- `curves`: a training's losses, learning rate and seconds
- `comparison`: the benchmark: forest plot of differences, tables, summary, label efficiency
- `predictions`: ROC, calibration, scatter, confusion, the worst errors; embeddings on a map
- `wording`: what they share: readable names, units, a score with its interval
- `live`: a figure that follows a run while it trains
- `explorer`: the interactive explorer of augmentations
- `recipe_controls`: its list of transforms, to be switched and dragged
- `saliency_figures`: maps over scans, as mosaics, of groups, by region, and in a viewer to scroll through
- `similarity`: how alike an encoder finds two views; the figure of it, beside the grey levels
"""
