"""Random views in batches, on the device where the batch lies.

- ``recipe``     what is drawn, from which ranges: data in ``recipes/*.yaml``
- ``draws``      one view's numbers, keyed by (seed, epoch, scan, view)
- ``spatial``    all geometry as one affine map, resampled once
- ``intensity``  shift, gamma, bias field, noise, z-score
- ``views``      a batch in, a batch of views out
"""
