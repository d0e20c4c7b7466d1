"""Linear probe for the comparison on Imagenette.

For a random encoder: --cfg-options model.backbone.init_cfg=None.
LARS moves weights by a share of their norm, so few steps need the rate of the large batch.
"""

_base_ = ['../_base_/protocols/linear.py', '../_base_/datasets/imagenette_128.py']

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch='mini',
        img_size=128,
        frozen_stages=6,
        init_cfg=dict(
            checkpoint='work_dirs/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/'
            'epoch_15.pth'
        ),
    ),
    head=dict(num_classes=10, in_channels=192),
)
_base_.param_scheduler[0].end = _base_.param_scheduler[1].begin = 1
train_cfg = dict(max_epochs=6, val_interval=6)
settings = dict(cpu_batch_size=None)
auto_scale_lr = dict(base_batch_size=64)
