"""`make bench`: this kit against its peers, as ratios measured in one run. See `benchmarks.run`."""
