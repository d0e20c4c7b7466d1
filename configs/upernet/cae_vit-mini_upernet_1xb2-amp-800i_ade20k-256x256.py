"""UperNet on the small encoder of configs/imagenette: a run of minutes on two CPU cores.

For looking at everything once, and for overfitting two images (docs/segmentation.md), of which
the five large classes are kept; the others are ignored.
"""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

from cae_mm.engine.settings import apply_settings

dims, updates, warmup = 192, 800, 40
classes = ('wall', 'building', 'sky', 'tree', 'grass')
weights = 'work_dirs/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/epoch_15.pth'

model = dict(
    backbone=dict(
        arch='mini',
        pretrain_img_size=128,
        drop_path_rate=0.0,
        out_indices=(1, 2, 3, 5),
        init_cfg=dict(checkpoint=weights),
    ),
    neck=dict(in_channels=dims, norm_cfg=dict(type='BN')),
    decode_head=dict(
        in_channels=[dims] * 4, channels=64, num_classes=len(classes), norm_cfg=dict(type='BN')
    ),
    auxiliary_head=dict(
        in_channels=dims, channels=64, num_classes=len(classes), norm_cfg=dict(type='BN')
    ),
)
apply_settings(_base_, img_size=256, transforms=dict(RandomResize=dict(ratio_range=(0.8, 1.25))))
train_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))
val_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[0].end = warmup + 1
_base_.param_scheduler[1].end = updates + 1
train_cfg = dict(max_iters=updates, val_interval=updates)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=updates))
auto_scale_lr = dict(base_batch_size=2)
