"""Prepared scans, and how training reads them.

- ``grid``     where prepared arrays lie in MNI152 millimetres
- ``store``    one blosc2 array a scan, beside an index and a record of the preparation
- ``leakage``  nobody and no scan on both sides, of a split or of an encoder and its test
- ``dataset``  prepared scans as a torch dataset, and batches of them
- ``sampler``  which scans an epoch's batches hold, and in what order
"""
