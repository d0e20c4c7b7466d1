"""Imagenette's training images at 128 px, without labels; second view of 64 px."""

_base_ = './in1k_two-view_224.py'

from cae_mm.engine.settings import apply_settings

apply_settings(
    _base_,
    batch_size=64,
    data_root='data/imagenette128/',
    cpu_batch_size=None,
    transforms=dict(
        TwoViewResizedCrop=dict(size=128, second_size=64, scale=(0.3, 1.0)),
        CAEMaskGenerator=dict(min_block=6),
    ),
)
train_dataloader = dict(drop_last=False)
