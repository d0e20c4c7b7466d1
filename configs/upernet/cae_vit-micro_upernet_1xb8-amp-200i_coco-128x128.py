"""UperNet for studies on two cores: COCO's objects in six classes, all else is ignored.

    for SPLIT in train val; do
        python tools/convert_coco.py masks data/coco/annotations/instances_${SPLIT}2017.json \
            data/coco_masks/$SPLIT --classes person animal vehicle furniture food kitchen
    done

No relative position bias and no layer scale of its own: MAE's encoder, which is judged beside it,
has none either. Scales that were learned in pretraining are loaded and stay as they are.
"""

_base_ = './cae_vit-base_upernet_4xb4-amp-20k_custom-512x512.py'

from cae_mm.engine.settings import apply_settings

dims, updates, warmup = 128, 200, 40
classes = ('person', 'animal', 'vehicle', 'furniture', 'food', 'kitchen')
colours = [[230, 60, 60], [230, 180, 40], [60, 120, 230], [140, 90, 50], [70, 180, 80]]
colours += [[170, 80, 200]]
weights = 'work_dirs/cae-dvae_vit-micro-p8_1xb64-amp-coslr-20e_imagenette-64px/epoch_20.pth'

_base_.model.backbone.arch = dict(embed_dims=dims, depth=4, num_heads=2, layer_scale=None)
norm_cfg = dict(type='BN')
model = dict(
    backbone=dict(
        pretrain_img_size=64,
        patch_size=8,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
        use_rel_pos_bias=False,
        init_cfg=dict(checkpoint=weights),
    ),
    neck=dict(in_channels=dims, patch_size=8, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[dims] * 4, channels=64, num_classes=len(classes), norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(in_channels=dims, channels=64, num_classes=len(classes), norm_cfg=norm_cfg),
)
apply_settings(
    _base_,
    img_size=128,
    data_root='data/',
    batch_size=8,
    transforms=dict(RandomResize=dict(ratio_range=(0.8, 1.6))),
)
labels = dict(metainfo=dict(classes=classes, palette=colours), reduce_zero_label=True)
train_dataloader = dict(
    num_workers=0,
    dataset=dict(
        **labels,
        data_prefix=dict(img_path='coco/train2017', seg_map_path='coco_masks/train'),
    ),
)
val_dataloader = dict(
    num_workers=0,
    dataset=dict(
        **labels,
        data_prefix=dict(img_path='coco/val2017', seg_map_path='coco_masks/val'),
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[0].end = warmup + 1
_base_.param_scheduler[1].end = updates + 1
train_cfg = dict(max_iters=updates, val_interval=updates)
default_hooks = dict(checkpoint=dict(interval=updates))
auto_scale_lr = dict(base_batch_size=8)
