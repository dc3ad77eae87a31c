"""One loop and what runs on it.

- ``loss``         NT-Xent, with a gather whose gradients sum over processes
- ``objectives``   SimCLR, the masked autoencoder, supervised: a batch in, a loss out
- ``optimizers``   optimisers, learning rates
- ``distributed``  processes on this machine or on the nodes of a Slurm job; BatchNorm over all of them
- ``checkpoint``   last, previous, best: whole or not at all
- ``stop``         the stop file and the Stop button
- ``progress``     what a run shows while it runs
- ``loop``         the loop, its state, the gradient of a step, validation
- ``monitor``      is it learning: measures on validation scans, and a verdict
- ``plan``         what a run would need
- ``pretrain``     2_pretrain
"""
