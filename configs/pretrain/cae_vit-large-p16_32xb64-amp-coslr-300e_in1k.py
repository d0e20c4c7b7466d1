"""CAE-L, 300 epochs, DALL-E tokens."""

_base_ = './cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

# the official script says so, but trains a decoder of width 768 (a missing backslash) with 12 heads
# and layer scale 0.1 (flags that never reach the model)
model = dict(
    backbone=dict(arch='large'),
    neck=dict(in_dims=1024, embed_dims=1024, num_heads=16, layer_scale=1e-5),
)
