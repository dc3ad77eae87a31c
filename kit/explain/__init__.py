"""Explain which parts of a scan drive a model's output, and test whether the maps can be trusted.

- `targets`: the output to explain: a prediction, a class, a similarity, a principal direction
- `saliency`: a map for one scan, by nine methods
- `explainer`: a model with the output to explain and the methods' options
- `maps`: 4_saliency: the model, the scans to explain, their maps and group means
- `checks`: sanity checks of maps, as numbers and as a verdict in words
- `shuffled`: the same network fine-tuned on shuffled labels, for one of the checks
- `truth`: maps compared with known effect locations
- `atlas`: region and side of each voxel: deepmriprep's atlases, any NIfTI of labels, a cohort's own label maps
- `atlas_files`, `label_names`: where atlases and region names are read from, and their licences
- `regions`: shares of a map by region, with intervals over participants
- `native`: maps resampled to the voxels of the scan's original file
"""
