"""Where in a scan a trained model's answer comes from, and whether to believe the picture.

- `saliency`: a map for one scan, by gradient or integrated gradients
- `checks`: the same map from a model with random weights: how alike are they?
- `atlas`: which region and side a voxel belongs to: deepmriprep's atlases, any NIfTI of labels, a cohort's own maps
- `atlas_files`, `label_names`: where atlases and their names are read from, and whose they are
- `regions`: how much of a map falls into which of them, with intervals over participants, or into a known place
- `groups`: the mean map of each group of participants, and their difference
- `native`: a map carried back to the voxels of the scan's own file
"""
