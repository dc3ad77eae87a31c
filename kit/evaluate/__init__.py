"""Evaluate encoders on downstream tasks.

- ``tasks``        a label with its participant-level split or folds, checked for leakage
- ``predict``      a network's output for each scan
- ``conformal``    predictions for scans without a label, with intervals or sets of classes
- ``measured``     features, volumes and voxels, computed once for each scan
- ``probe``        linear probes on frozen features
- ``tune``         fine-tuning of all weights; learning rate and stopping point chosen on validation
- ``baselines``    predictions without an encoder: guessing, age and sex, site, ``volumes``, voxels
- ``metrics``      AUC, mean absolute error and others over participants
- ``compare``      scores over seeds, and paired differences between encoders
- ``reliability``  how similar an encoder's features are for repeated scans of one person
- ``finetune``     3_finetune
- ``benchmark``    5_benchmark
"""
