"""Where in a scan a trained model's answer comes from, and whether to believe the picture.

- `saliency`: a map for one scan, by gradient or integrated gradients
- `checks`: the same map from a model with random weights: how alike are they?
- `regions`: how much of a map falls into which part of the brain, or into a place known beforehand
"""
