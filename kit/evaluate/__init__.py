"""What an encoder is worth on downstream tasks.

- ``tasks``      a label with its participants split, checked for leakage
- ``predict``    what a network gives for each scan
- ``metrics``    AUC and mean absolute error over participants, with bootstrap intervals
- ``probe``      linear probes on frozen features
- ``reliability``  how alike one person's scans are to an encoder
- ``finetune``   3_finetune
- ``benchmark``  5_benchmark
"""
