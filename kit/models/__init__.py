"""Networks, mostly MONAI's, and the files that hold their weights.

- ``encoders``   (batch, 1, depth, height, width) -> (batch, features); ``encoder``: what all of them are
- ``convolution``  a 3D convolution whose gradient is right in bfloat16 on a CPU, too
- ``rivals``     published third-party networks, which convert the kit's scans to their own input
- ``pooling``    global average pooling
- ``features``   which activations count as a scan's features: pooling, stages, mirrored copies
- ``reference``  a model's training features, and how far another scan lies from them
- ``heads``      the projection head, and an encoder with a prediction head
- ``mae``        the masked autoencoder
- ``encoder_file``  encoder.safetensors: weights with the record of how to use them
- ``formats``    published encoders: parameter names, preparation, data, licence
- ``foreign``    a published file, or any state dict, as an encoder with a record
- ``weights``    downloads released weights on request
- ``export``     an encoder as a MONAI network, a MONAI bundle and a `torch.export` program
- ``card``       the model card of an encoder
"""
