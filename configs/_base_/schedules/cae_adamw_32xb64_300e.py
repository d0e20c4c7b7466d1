"""AdamW, batch 2048 = 32 GPUs x 64, 300 epochs with 10 of warm-up (paper); rest official."""

lr = 1.5e-3
optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    constructor='cae_mm.LayerDecayOptimWrapperConstructor',  # no decay on 1-D and class token
    optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / lr,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=10, convert_to_iter_based=True
    ),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300)
auto_scale_lr = dict(enable=True, base_batch_size=32 * 64)
