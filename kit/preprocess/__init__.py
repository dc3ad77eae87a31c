"""From a scan's files to the store: read, strip, register, resample, scale, check.

- ``settings``    how scans are prepared, and the words that say it
- ``place``       where voxels lie: units of length, sform and qform
- ``nifti``       reading and writing NIfTI
- ``dicom``       reading a folder with one DICOM series
- ``scan_file``   reading any of the formats
- ``resample``    resampling, and arrays as SimpleITK images
- ``template``    the MNI152 template, its brain and its white matter
- ``mask``        masks from values: a mask file's, a stripped scan's own
- ``skullstrip``  brain masks: given, of stripped scans, deepbet's, other tools'
- ``register``    registration to the template (SimpleITK)
- ``intensity``   bias field and intensity scale
- ``quality``     QC metrics of each scan; flags by limits and by its site's distribution
- ``selection``   whom refusals and flags hit, by each label
- ``pool``        many tasks over a few processes, one of which may be killed
- ``index``       the index, the failed scans, shards merged
- ``preprocess``  one scan, then a cohort, into the store
"""
