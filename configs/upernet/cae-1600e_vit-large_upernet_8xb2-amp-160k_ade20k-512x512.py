"""UperNet on CAE-L of 1600 epochs, ADE20K; official: 54.9 mIoU."""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

checkpoint = 'work_dirs/cae_vit-large-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth'
model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.15,
        out_indices=(7, 11, 15, 23),
        init_cfg=dict(checkpoint=checkpoint),
    ),
    neck=dict(in_channels=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=4e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
