"""Prepared scans, and how training reads them.

- ``grid``     where prepared arrays lie in MNI152 millimetres
- ``store``    one blosc2 array per scan, an index, and a record of the preparation
- ``leakage``  checks that no person or scan is on both sides of a split, or of pretraining and test
- ``dataset``  prepared scans as a torch dataset, and batches of them
- ``sampler``  which scans an epoch's batches hold, and in what order
"""
