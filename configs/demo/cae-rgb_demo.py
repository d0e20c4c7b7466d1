"""CAE for docs/first_encoder.md: a smaller ViT than `make demo`'s, pixels as targets.

The crops are equally bright, so the mean of what is visible tells nothing of what is hidden, and
the first thing to learn is to look at neighbours. With the paper's way (masked blocks, layer scale
of 0.1, an alignment of weight 2, which suits cross entropy) 220 steps had not brought that yet.
"""

_base_ = './cae_demo.py'

from cae_mm.engine.settings import apply_settings

model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[50.0] * 3),  # the crops': grey stays grey
    backbone=dict(arch=dict(_delete_=True, embed_dims=128, depth=4, num_heads=2, layer_scale=None)),
    neck=dict(in_dims=128, embed_dims=128, num_heads=2, out_dims=8 * 8 * 3, layer_scale=None),
    head=dict(align_weight=0.2),
    target_generator=dict(_delete_=True, type='cae_mm.RGBTarget'),
)
apply_settings(
    _base_,
    batch_size=32,
    transforms=dict(
        TwoViewResizedCrop=dict(second_size=None), CAEMaskGenerator=dict(strategy='random')
    ),
)
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.95)))
auto_scale_lr = dict(base_batch_size=32)
