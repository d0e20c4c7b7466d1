"""Attentive probe of CAE-L, as of CAE-B. Paper: 81.2 after 1600 epochs of pretraining."""

_base_ = './vit-base-p16_cae-pre_32xb256-attentive-coslr-90e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        frozen_stages=24,
        init_cfg=dict(
            checkpoint='work_dirs/cae_vit-large-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth'
        ),
    ),
    head=dict(in_channels=1024, num_heads=16),
)
