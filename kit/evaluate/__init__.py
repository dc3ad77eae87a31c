"""What an encoder is worth on downstream tasks.

- ``tasks``      a label with its participants split, checked for leakage
- ``predict``    what a network gives for each scan
- ``metrics``    AUC and mean absolute error over participants, with bootstrap intervals
- ``probe``      linear probes on frozen features
- ``tune``       all weights trained, at the rate and for the steps that validation prefers
- ``finetune``   3_finetune
- ``benchmark``  5_benchmark
"""
