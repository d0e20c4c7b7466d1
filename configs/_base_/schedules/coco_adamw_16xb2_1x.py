"""AdamW, batch 32 = 16 GPUs x 2, 12 epochs with steps at 9 and 11 (paper, official)."""

optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    # mmcv's RoIAlign knows no bfloat16, which also rounds coordinates of 1333 to 8 pixels: heads
    # run in float32 (official: all but losses in float16)
    modules=['backbone', 'neck'],
    constructor='cae_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=3e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(layer_decay_rate=0.75),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, milestones=[9, 11], gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=True, base_batch_size=16 * 2)
