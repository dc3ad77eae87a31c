"""What an encoder is worth on downstream tasks.

- ``tasks``      a label with its participants split, checked for leakage
- ``predict``    what a network gives for each scan
- ``metrics``    AUC, mean absolute error and others over participants, with bootstrap intervals
- ``compare``    scores over seeds, paired differences between encoders
- ``probe``      linear probes on frozen features
- ``finetune``   3_finetune
- ``benchmark``  5_benchmark
"""
