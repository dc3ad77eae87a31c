"""From files on disk to batches.

- ``cohort``      tables and BIDS folders, one scan a row
- ``labels``      a label column as numbers, with its kind checked
- ``split``       participants into train, validation and test
- ``sample``      the procedural sample cohort
- ``grid``        where prepared arrays lie in MNI152 millimetres
- ``nifti``       reading and writing NIfTI
- ``register``    registration to the MNI152 template (SimpleITK)
- ``preprocess``  one scan, then a cohort, into the store
- ``store``       prepared scans: one blosc2 array each and an index
- ``loader``      batches of prepared scans, in an order that (seed, epoch) alone decide
- ``sampling``    which scans an epoch takes: balanced over datasets, two sessions as a pair
"""
