"""d-VAE for `make demo`: 256 tokens, learned from grayscale crops in about a minute."""

_base_ = ['../_base_/models/dvae.py', '../_base_/runtime.py']

model = dict(vocab_size=256, codebook_dims=64, hidden_dims=64, num_res_blocks=1)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root='work_dirs/demo/crops/',
        data_prefix='train',
        with_label=False,
        pipeline=[
            dict(type='cae_mm.LoadImage'),
            dict(type='mmpretrain.RandomFlip', prob=0.5),
            dict(
                type='mmpretrain.RandomResizedCrop',
                scale=64,
                crop_ratio_range=(0.3, 1.0),
                backend='pillow',
                interpolation='lanczos',
            ),
            dict(type='mmpretrain.PackInputs'),
        ],
    ),
)
optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    constructor='cae_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, convert_to_iter_based=True)
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
auto_scale_lr = dict(enable=True, base_batch_size=32)
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='cae_mm.GumbelTemperatureHook'),
]
