"""Where in a scan a model's answer comes from, and whether to believe the picture.

- `targets`: what is asked: an output, a class, likeness, a principal direction
- `saliency`: a map for one scan, by nine methods
- `asked`: a model, what is asked of it, and how
- `maps`: 4_saliency's model, whom to look at, their maps and the means of these
- `checks`: can a map be believed? numbers, and a verdict in words
- `shuffled`: the same network, fine-tuned on shuffled labels, for one of the checks
- `truth`: maps against places that are known
- `atlas`: which region and side a voxel belongs to: deepmriprep's atlases, any NIfTI of labels, a cohort's own maps
- `atlas_files`, `label_names`: where atlases and their names are read from, and whose they are
- `regions`: how much of a map falls into which of them, with intervals over participants, or into a known place
- `native`: a map carried back to the voxels of the scan's own file
"""
