"""UperNet on the small encoder of configs/imagenette: a run of minutes on two CPU cores.

For looking at everything once, and for overfitting two images (docs/segmentation.md), of which
the five large classes are kept; the others are ignored.
"""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

dims, crop_size, updates, warmup = 192, (256, 256), 800, 40
scale = (1024, 256)
classes = ('wall', 'building', 'sky', 'tree', 'grass')
weights = 'work_dirs/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/epoch_15.pth'

model = dict(
    data_preprocessor=dict(size=crop_size, test_cfg=dict(size=crop_size)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=dims, depth=6, num_heads=3, layer_scale=0.1),
        img_size=crop_size,
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
    test_cfg=dict(crop_size=crop_size, stride=(171, 171)),
)
_base_.train_pipeline[2].update(scale=scale, ratio_range=(0.8, 1.25))
_base_.train_pipeline[3].crop_size = crop_size
_base_.test_pipeline[1].scale = scale
metainfo = dict(classes=classes)
train_dataloader = dict(
    num_workers=1, dataset=dict(metainfo=metainfo, pipeline=_base_.train_pipeline)
)
val_dataloader = dict(num_workers=1, dataset=dict(metainfo=metainfo, pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[0].end = warmup + 1
_base_.param_scheduler[1].end = updates + 1
train_cfg = dict(max_iters=updates, val_interval=updates)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=updates))
auto_scale_lr = dict(enable=True, base_batch_size=2)
