"""Where in a scan a model's answer comes from, and whether to believe the picture.

- `targets`: what is asked: an output, a class, likeness, a principal direction
- `saliency`: a map for one scan, by nine methods
- `asked`: a model, what is asked of it, and how
- `maps`: 4_saliency's model, whom to look at, their maps and the means of these
- `checks`: can a map be believed? numbers, and a verdict in words
- `shuffled`: the same network, fine-tuned on shuffled labels, for one of the checks
- `truth`: maps against places that are known
- `regions`: how much of a map falls into which part of the brain, or into a place known beforehand
"""
