"""Who is who: tables of scans, their labels and splits.

- ``tabular``      what is a number, text or missing in a table; the kit's own tables come back as they were
- ``identity``     names of participants, sessions and datasets; people known under several
- ``collections``  FOMO60K, FOMO300K and OpenMind as they are published
- ``bids``         a BIDS folder
- ``tables``       any of these, or a CSV: one scan a row
- ``labels``       a label column as numbers, with its kind checked
- ``split``        participants into train, validation and test
"""
