"""Pictures, curves, tables and the explorer's widgets. Figures are returned, neither shown nor kept by
pyplot.

- `planes`: cut a volume the right way up; millimetres to voxels; grey levels
- `figure`: an empty figure with its title and its note ("procedural data")
- `slices`: a scan in three planes with overlay and outline; many scans; views beside their original
- `curves`: training, label efficiency, predictions, embeddings, cohort, registration; the benchmark's table
- `live`: a figure that follows a run while it trains
- `explorer`: the interactive explorer of augmentations, and the same picture as a PNG
"""
