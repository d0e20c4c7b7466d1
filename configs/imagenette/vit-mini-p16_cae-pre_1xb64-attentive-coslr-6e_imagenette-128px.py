"""Attentive probe for the comparison on Imagenette."""

_base_ = './vit-mini-p16_cae-pre_1xb64-linear-coslr-6e_imagenette-128px.py'

model = dict(
    backbone=dict(out_type='raw'), head=dict(type='cae_mm.AttentiveProbeHead', num_heads=3)
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, weight_decay=0.0, momentum=0.9)
)
