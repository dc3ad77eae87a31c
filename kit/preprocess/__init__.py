"""From a scan's files to the store: read, strip, register, resample, scale, check.

- ``settings``    the preparation's settings and their allowed values
- ``header``      where voxels lie: units of length, sform and qform
- ``nifti``       reading and writing NIfTI
- ``dicom``       reading a folder with one DICOM series
- ``scan_file``   reading any supported format
- ``resample``    resampling, and arrays as SimpleITK images
- ``template``    the MNI152 template, its brain and its tissues
- ``mask``        brain masks from the values of a mask file or of a skull-stripped scan
- ``skullstrip``  brain masks: given, of stripped scans, by deepbet or by other tools
- ``register``    registration to the template (SimpleITK)
- ``intensity``   bias field correction and intensity normalisation
- ``quality``     QC metrics of each scan; flags by limits and by its site's distribution
- ``selection``   which groups are refused or flagged more often, by label
- ``pool``        many jobs over a few processes, any of which may be killed
- ``index``       the index, the failed scans, and merging of shards
- ``preprocess``  one scan, then a cohort, into the store
"""
