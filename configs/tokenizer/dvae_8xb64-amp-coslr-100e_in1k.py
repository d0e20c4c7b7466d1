"""d-VAE on crops of 112 px, 14 x 14 tokens an image.

The recipe is this project's: the CAE paper trains a d-VAE on ImageNet-1k without giving one.
Annealing of the temperature (1 to 1/16) and optimizer follow DALL-E (arXiv 2102.12092, A.2).
"""

_base_ = [
    '../_base_/models/dvae.py',
    '../_base_/datasets/in1k_two-view_224.py',
    '../_base_/runtime.py',
]

_base_.train_pipeline[1:3] = [  # for the two views and the mask
    dict(type='mmpretrain.RandomFlip', prob=0.5),
    dict(type='mmpretrain.RandomResizedCrop', scale=112, backend='pillow', interpolation='lanczos'),
]
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))

lr = 5e-4
optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    constructor='cae_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=lr / 80,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100)
auto_scale_lr = dict(enable=True, base_batch_size=8 * 64)
settings = dict(cpu_batch_size=8)
custom_hooks = [*_base_.custom_hooks, dict(type='cae_mm.GumbelTemperatureHook')]
