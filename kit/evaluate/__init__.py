"""What an encoder is worth on downstream tasks.

- ``tasks``      a label with its participants split, checked for leakage
- ``predict``    what a network gives for each scan
- ``metrics``    AUC and mean absolute error over participants, with bootstrap intervals
- ``probe``      linear probes on frozen features
- ``baselines``  what no encoder is needed for: guessing, age and sex, site, volumes, voxels
- ``volumes``    brain volumes of prepared scans, or from a table
- ``finetune``   3_finetune
- ``benchmark``  5_benchmark
"""
