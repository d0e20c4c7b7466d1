"""Fine-tuning for the comparison on Imagenette."""

_base_ = '../finetune/vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py'

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),
        img_size=128,
        drop_path_rate=0.0,
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
lr = 1e-3
optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=0.75))
_base_.param_scheduler[0].update(start_factor=0.01, end=1)
_base_.param_scheduler[1].update(eta_min_ratio=0.01, begin=1)
train_cfg = dict(max_epochs=3, val_interval=3)
auto_scale_lr = dict(enable=True, base_batch_size=64)
