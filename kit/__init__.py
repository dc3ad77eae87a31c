"""Self-supervised pretraining for 3D brain MRI, driven by notebooks.

In the order of the data flow:

- ``kit.errors``      the base class of the kit's errors
- ``kit.machine``     file locks, cores, the nodes of a Slurm job
- ``kit.cells``       the parameters cells of the running notebook
- ``kit.runs``        a run's folder: what each notebook reads and writes
- ``kit.report``      HTML pages of a run: its report and index
- ``kit.reading``     reads and checks parameters from cells and files
- ``kit.seeding``     keyed random numbers, scan keys
- ``kit.device``      the device, precision, scans at a time, threads and memory
- ``kit.cohort``      participants and scans: tables, BIDS, labels, splits
- ``kit.store``       prepared scans: grid, files, dataset, sampler
- ``kit.preprocess``  from files to the store: read, strip, register, resample, scale, check
- ``kit.provenance``  what a run was made from, what has changed since, and which preparations fit together
- ``kit.augment``     random views, made in batches on the training device
- ``kit.problems``    checks the files that parameters name
- ``kit.params``      every parameter of every notebook: name, unit, default, bounds
- ``kit.sample``      the procedural sample cohort; only notebooks import it
- ``kit.models``      encoders, heads, the masked autoencoder, encoder files, exports and model cards
- ``kit.train``       one loop, its objectives, distributed launch, the monitor
- ``kit.evaluate``    tasks, predictions, metrics, probes, fine-tuning, the benchmark
- ``kit.explain``     saliency maps, their sanity checks, regions
- ``kit.show``        slices, montages, curves, tables, the augmentation explorer
- ``kit.export``      writes an encoder for model hubs, MONAI and plain torch
- ``kit.apply``       any scan to an embedding or a prediction
- ``kit.execute``     runs a notebook headless and writes its HTML report

Imports point one way: a module may import only what is above it in this list.
"""

__version__ = "0.1.0"
