"""Networks, mostly MONAI's, and the files that hold their weights.

- ``encoders``   (batch, 1, depth, height, width) -> (batch, features); ``encoder``: their base class
- ``convolution``  a 3D convolution whose gradient is right in bfloat16 on a CPU, too
- ``pooling``    the global average in float32, and maxima whose gradient is bit-reproducible on CUDA
- ``features``   which activations count as a scan's features: pooling, stages, mirrored copies
- ``reference``  a model's training features, and how far another scan lies from them
- ``heads``      the projection head, and an encoder with a prediction head
- ``mae``        the masked autoencoder
- ``encoder_file``  encoder.safetensors: weights with the record of how to use them
- ``third_party_networks``  published networks, which convert the kit's scans to their own input
- ``third_party_formats``   published encoders: parameter names, preparation, data, licence
- ``third_party_files``     a published file, or any state dict, as an encoder with a record
- ``weights``    downloads released weights on request
- ``bundle``     an encoder as a MONAI network, a MONAI bundle and a `torch.export` program
- ``card``       the model card of an encoder
"""
