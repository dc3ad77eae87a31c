"""Self-supervised pretraining for 3D brain MRI, driven by notebooks.

In the order in which the data flow:

- ``kit.params``   every knob of every notebook: name, unit, default, bounds
- ``kit.runs``     a run's folder: what each notebook reads and leaves behind
- ``kit.data``     cohort tables, the procedural sample cohort, preprocessing, the store, loading
- ``kit.augment``  random views, made in batches on the training device
- ``kit.models``   encoders, heads, the masked autoencoder, encoder files
- ``kit.train``    one loop, its objectives, distributed launch, probes, fine-tuning, the benchmark
- ``kit.explain``  saliency maps, their sanity checks, regions
- ``kit.show``     slices, montages, curves, tables, the augmentation explorer
- ``kit.execute``  runs a notebook headless and leaves its HTML report

Imports point one way, from the top of this list to the bottom.
"""

__version__ = "0.1.0"
