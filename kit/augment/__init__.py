"""Random views, made in batches on the batch's own device.

- ``transforms``  everything that can be done to a scan: probability, ranges in real units, source
- ``recipe``      which transforms make up a view: data in ``recipes/*.yaml``
- ``draws``       one view's random numbers, keyed by (seed, epoch, scan, view)
- ``spatial``     all geometry as one map, resampled once
- ``contrast``    gamma, contrast, histogram, bias field, noise, z-score
- ``physics``     motion, ghosts, spikes, ringing, thick slices, blur; boxes and patches cut out
- ``masking``     masked patches, for recipes and the masked autoencoder
- ``views``       a batch in, a batch of views out; on a CPU one scan after the other
- ``batched``     the same for the whole batch at once, on a GPU
"""
