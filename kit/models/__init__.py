"""Networks: MONAI's, with one way in and one way out.

- ``encoders``   (batch, 1, depth, height, width) -> (batch, features)
- ``rivals``     networks of others, which make their own input of the kit's scans
- ``pooling``    the mean over places
- ``features``   which numbers are a scan's features: pooling, stages, mirrored copies
- ``reference``  what a model has seen, and how far from that a scan lies
- ``heads``      the projection head, and an encoder with a prediction head
- ``mae``        the masked autoencoder
- ``encoder_file``  encoder.safetensors: weights with the record of how to use them again
- ``formats``    published encoders: names in their files, preparation, data, licence
- ``foreign``    a file of theirs, or any state dict, as an encoder with a record
- ``weights``    released files, downloaded when somebody asks
- ``export``     an encoder in MONAI's own classes, as a MONAI bundle, as an exported program
- ``card``       its model card
"""
