"""CAE for `make demo`: a small ViT on grayscale crops of 64 px, 8 x 8 patches, own tokens."""

_base_ = [
    '../_base_/models/cae-dvae_vit-mini.py',
    '../_base_/datasets/in1k_two-view_224.py',
    '../_base_/schedules/cae_adamw_32xb64_300e.py',
    '../_base_/runtime.py',
]

from cae_mm.engine.settings import apply_settings

apply_settings(
    _base_,
    data_root='work_dirs/demo/crops/',
    cpu_batch_size=None,
    transforms=dict(
        TwoViewResizedCrop=dict(size=64, second_size=64, scale=(0.3, 1.0)),
        CAEMaskGenerator=dict(patch_size=8, min_block=6),
    ),
)
model = dict(
    backbone=dict(img_size=64, patch_size=8),
    neck=dict(out_dims=256),
    target_generator=dict(
        vocab_size=256, init_cfg=dict(checkpoint='work_dirs/demo/dvae/epoch_8.pth')
    ),
)
train_dataloader = dict(num_workers=0)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[0].update(start_factor=0.01, end=2)
_base_.param_scheduler[1].begin = 2
train_cfg = dict(max_epochs=14)
auto_scale_lr = dict(base_batch_size=64)
