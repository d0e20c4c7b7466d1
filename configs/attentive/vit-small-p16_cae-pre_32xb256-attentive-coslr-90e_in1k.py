"""Attentive probe of CAE-S, as of CAE-B."""

_base_ = './vit-base-p16_cae-pre_32xb256-attentive-coslr-90e_in1k.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(
            checkpoint='work_dirs/cae_vit-small-p16_32xb64-amp-coslr-300e_in1k/epoch_300.pth'
        ),
    ),
    head=dict(in_channels=384, num_heads=6),
)
