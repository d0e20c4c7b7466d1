"""Fine-tuning: layer decay 0.65, relative position bias, mixup, batch 4096 (paper, official)."""

_base_ = ['../models/vit-base-p16_cae-pre.py', '../runtime.py']

model = dict(
    backbone=dict(
        out_type='avg_featmap',  # with the pretrained final norm, as official fc_norm
        use_rel_pos_bias=True,
        drop_path_rate=0.1,
    ),
    head=dict(
        type='mmpretrain.LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02 * 0.001),  # official init_scale
    ),
    train_cfg=dict(
        augments=[
            dict(type='mmpretrain.Mixup', alpha=0.8),
            dict(type='mmpretrain.CutMix', alpha=1.0),
        ]
    ),
)
# official: rand-m9-mstd0.5-inc1, set in the program, not in its scripts; with it timm leaves out
# --color_jitter 0.4
randaugment_and_erasing = [
    dict(
        type='mmpretrain.RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),  # BGR
    ),
    dict(
        type='mmpretrain.RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=[103.53, 116.28, 123.675],  # BGR
        fill_std=[57.375, 57.12, 58.395],
    ),
]

lr = 8e-3
optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    constructor='cae_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(layer_decay_rate=0.65),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / lr,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / lr,  # in proportion in each layer
        by_epoch=True,
        begin=5,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100)
default_hooks = dict(checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=1))
settings = dict(cpu_batch_size=16)
auto_scale_lr = dict(enable=True, base_batch_size=32 * 128)
