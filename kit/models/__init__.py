"""Networks: MONAI's, with one way in and one way out.

- ``encoders``   (batch, 1, depth, height, width) -> (batch, features)
- ``rivals``     networks of others, which make their own input of the kit's scans
- ``pooling``    the mean over places
- ``heads``      the projection head, and an encoder with a prediction head
- ``mae``        the masked autoencoder
- ``encoder_file``  encoder.safetensors: weights with the record of how to use them again
- ``formats``    published encoders: names in their files, preparation, data, licence
- ``foreign``    a file of theirs, or any state dict, as an encoder with a record
- ``weights``    released files, downloaded when somebody asks
"""
