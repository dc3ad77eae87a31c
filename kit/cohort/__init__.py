"""Cohorts: tables of scans, their labels and splits.

- ``tabular``      read tables: numbers, text and missing cells, without loss in the kit's own files
- ``identity``     names of participants, sessions and datasets; aliases of one person
- ``collections``  FOMO60K, FOMO300K and OpenMind as published
- ``bids``         BIDS folders
- ``tables``       any of these, or a CSV, as one table with one scan a row
- ``labels``       a label column as numbers, with its kind checked
- ``split``        participants into train, validation and test
"""
