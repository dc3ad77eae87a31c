"""Self-supervised pretraining for 3D brain MRI, driven by notebooks.

In the order in which the data flow:

- ``kit.machine``     file locks, cores, a Slurm job's nodes, where the system has them
- ``kit.cells``       the cells of parameters of the running notebook, as they stand now
- ``kit.runs``        a run's folder: what each notebook reads and leaves behind
- ``kit.reading``     parameters from cells and files, refused where they cannot be used
- ``kit.seeding``     keyed random numbers, scan keys
- ``kit.device``      the device, precision, scans at a time, threads and memory
- ``kit.cohort``      tables, BIDS, labels, splits: who is who
- ``kit.store``       prepared scans: grid, files, dataset, sampler
- ``kit.preprocess``  from files to the store: read, strip, register, resample, scale, check
- ``kit.provenance``  what a run was made from, what has changed since, and what must agree where stores meet
- ``kit.augment``     random views, made in batches on the training device
- ``kit.problems``    what is wrong with files that parameters name
- ``kit.params``      every parameter of every notebook: name, unit, default, bounds
- ``kit.sample``      the procedural sample cohort; only notebooks import it
- ``kit.models``      encoders, heads, the masked autoencoder, encoder files, weights for others and their card
- ``kit.train``       one loop, its objectives, distributed launch, the monitor
- ``kit.evaluate``    tasks, predictions, metrics, probes, fine-tuning, the benchmark
- ``kit.explain``     saliency maps, their sanity checks, regions
- ``kit.show``        slices, montages, curves, tables, the augmentation explorer
- ``kit.export``      writes an encoder for model hubs, MONAI and plain torch
- ``kit.apply``       any scan to an embedding or a prediction
- ``kit.execute``     runs a notebook headless and leaves its HTML report

Imports point one way: a module may use what stands above it in this list.
"""

__version__ = "0.1.0"
