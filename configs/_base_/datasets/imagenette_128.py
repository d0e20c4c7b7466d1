"""Imagenette, ten classes of ImageNet at 128 px: data/imagenette128/{train,val}/CLASS/."""

_base_ = './in1k_224.py'

from cae_mm.engine.settings import apply_settings

apply_settings(
    _base_,
    transforms=dict(
        RandomResizedCrop=dict(scale=128, crop_ratio_range=(0.3, 1.0)),
        ResizeEdge=dict(scale=128),
        CenterCrop=dict(crop_size=128),
    ),
)
dataset = dict(_delete_=True, type='mmpretrain.CustomDataset', data_root='data/imagenette128/')
train_dataloader = dict(
    batch_size=64,
    dataset=dict(**dataset, data_prefix='train', pipeline=_base_.train_pipeline),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(**dataset, data_prefix='val', pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
