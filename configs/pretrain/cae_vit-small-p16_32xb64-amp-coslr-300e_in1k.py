"""CAE-S, 300 epochs, DALL-E tokens."""

_base_ = './cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

# paper: "standard ViT-S", 6 heads; official code: 12 heads, and a decoder of width 768
model = dict(
    backbone=dict(arch='small'),
    neck=dict(in_dims=384, embed_dims=384, num_heads=6),
)
