"""Random views in batches, on the device where the batch lies.

- ``transforms``  what can be done to a scan: each with a probability, ranges in real units, and its source
- ``recipe``      which of them a view is made of: data in ``recipes/*.yaml``
- ``draws``       one view's numbers, keyed by (seed, epoch, scan, view)
- ``spatial``     all geometry as one map, resampled once
- ``intensity``   gamma, contrast, histogram, bias field, noise, z-score
- ``physics``     motion, ghosts, spikes, ringing, thick slices, blur; boxes and patches cut out
- ``views``       a batch in, a batch of views out
"""
