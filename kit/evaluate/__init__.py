"""What an encoder is worth on downstream tasks.

- ``tasks``        a label with its participants split, once or in folds, checked for leakage
- ``predict``      what a network gives for each scan
- ``probe``        linear probes on frozen features
- ``tune``         all weights trained, at the rate and for the steps that validation prefers
- ``baselines``    what needs no encoder: guessing, age and sex, site, ``volumes``, voxels
- ``metrics``      AUC, mean absolute error and others over participants
- ``compare``      scores over seeds, and paired differences between encoders
- ``reliability``  how alike one person's scans are to an encoder
- ``finetune``     3_finetune
- ``benchmark``    5_benchmark
"""
