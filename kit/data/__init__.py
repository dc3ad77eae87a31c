"""From files on disk to batches.

- ``tabular``     what is a number, text or missing in a table; the kit's own tables come back as they were
- ``identity``    who is who: names of participants, sessions and datasets; people known under several
- ``cohort``      tables and BIDS folders, one scan a row
- ``labels``      a label column as numbers, with its kind checked
- ``split``       participants into train, validation and test
- ``leakage``     nobody and no scan on both sides, of a split or of an encoder and its test
- ``sample``      the procedural sample cohort
- ``choices``     the words that say how scans are prepared
- ``grid``        where prepared arrays lie in MNI152 millimetres
- ``place``       where voxels lie: units of length, sform and qform
- ``nifti``       reading and writing NIfTI
- ``dicom``       reading a folder with one DICOM series
- ``resample``    resampling, and arrays as SimpleITK images
- ``template``    the MNI152 template, its brain and its white matter
- ``register``    registration to the template (SimpleITK)
- ``mask``        masks from values: a mask file's, a stripped scan's own
- ``brain``       brain masks: given, of stripped scans, deepbet's, other tools'
- ``intensity``   bias field and intensity scale
- ``quality``     QC metrics of each scan; flags by limits and by its site's distribution
- ``selection``   whom refusals and flags hit, by each label
- ``pool``        many tasks over a few processes, one of which may be killed
- ``table``       the index, the failed scans, shards merged
- ``preprocess``  one scan, then a cohort, into the store
- ``store``       prepared scans: one blosc2 array each and an index
- ``batch``       some scans together, on a device or between processes
- ``loader``      batches of prepared scans, which and in what order (seed, epoch) alone decide
"""
