"""CAE for the comparison on Imagenette: 6 blocks of width 192, 128 px, 32 of 64 patches masked."""

_base_ = [
    '../_base_/models/cae-dvae_vit-mini.py',
    '../_base_/datasets/imagenette_two-view_128.py',
    '../_base_/schedules/cae_adamw_32xb64_300e.py',
    '../_base_/runtime.py',
]

model = dict(backbone=dict(img_size=128))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[0].update(start_factor=0.01, end=2)
_base_.param_scheduler[1].begin = 2
train_cfg = dict(max_epochs=15)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
auto_scale_lr = dict(base_batch_size=64)
