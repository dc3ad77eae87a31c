"""Networks: MONAI's, with one way in and one way out.

- ``encoders``   (batch, 1, depth, height, width) -> (batch, features)
- ``heads``      the projection head, and an encoder with a prediction head
- ``mae``        the masked autoencoder
- ``encoder_file``  encoder.safetensors: weights with the record of how to use them again
- ``export``     an encoder in MONAI's own classes, as a MONAI bundle, as an exported program
- ``card``       its model card
"""
