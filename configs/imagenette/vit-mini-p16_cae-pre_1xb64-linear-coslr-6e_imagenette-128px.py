"""Linear probe for the comparison on Imagenette.

For a random encoder: --cfg-options model.backbone.init_cfg=None.
LARS moves weights by a share of their norm, so few steps need the rate of the large batch.
"""

_base_ = '../linear/vit-base-p16_cae-pre_1xb1024-linear-coslr-90e_in1k.py'

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),
        img_size=128,
        frozen_stages=6,
        init_cfg=dict(
            checkpoint='work_dirs/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/'
            'epoch_15.pth'
        ),
    ),
    head=dict(num_classes=10, in_channels=192),
)
_base_.train_pipeline[1].update(scale=128, crop_ratio_range=(0.3, 1.0))
_base_.test_pipeline[1].scale = _base_.test_pipeline[2].crop_size = 128
dataset = dict(type='mmpretrain.CustomDataset', data_root='data/imagenette128/', _delete_=True)
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    dataset=dict(**dataset, data_prefix='train', pipeline=_base_.train_pipeline),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=False,
    dataset=dict(**dataset, data_prefix='val', pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=6.4))
_base_.param_scheduler[0].end = _base_.param_scheduler[1].begin = 1
train_cfg = dict(max_epochs=6, val_interval=6)
auto_scale_lr = dict(enable=True, base_batch_size=64)
