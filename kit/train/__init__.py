"""One loop and what runs on it.

- ``loss``        NT-Xent, with a gather whose gradients sum over processes
- ``distributed`` processes: launch, threads, BatchNorm over all of them
- ``nodes``       processes on several nodes of a Slurm job
- ``stop``        the stop file and the Stop button
- ``objectives``  SimCLR, the masked autoencoder, supervised: a batch in, a loss out
- ``checkpoint``  last, previous, best: whole or not at all
- ``optimizers``  optimisers, learning rates
- ``step``        the gradient of one step: accumulated, in chunks
- ``journal``     what a run shows while it runs
- ``state``       what the loop carries from step to step, and a checkpoint gives back
- ``loop``        the loop
- ``monitor``     is it learning: measures on held-out scans, and a verdict
- ``pretrain``    2_pretrain
- ``evaluate``    predictions, embeddings, linear probes, metrics with intervals
- ``finetune``    3_finetune
- ``benchmark``   5_benchmark
"""
