"""The training loop and everything it uses.

- ``loss``         NT-Xent, with a gather that sums gradients over processes
- ``objectives``   SimCLR, masked autoencoder, supervised: a batch in, a loss out
- ``optimizers``   optimisers and learning-rate schedules
- ``distributed``  processes on this machine or on the nodes of a Slurm job; BatchNorm over all of them
- ``checkpoint``   the last, previous and best checkpoint, written atomically
- ``stop``         the stop file and the Stop button
- ``progress``     live progress of a run
- ``loop``         the loop, its state, the gradients of a step, validation
- ``monitor``      is it learning: measures on validation scans, and a verdict
- ``plan``         estimates the memory and hours of a run
- ``pretrain``     runs 2_pretrain
"""
