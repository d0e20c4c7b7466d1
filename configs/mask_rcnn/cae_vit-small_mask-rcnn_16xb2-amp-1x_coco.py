"""Mask R-CNN on CAE-S (paper; no official config)."""

_base_ = './cae_vit-base_mask-rcnn_16xb2-amp-1x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(
            checkpoint='work_dirs/cae_vit-small-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth'
        ),
    )
)
_base_.model.neck[0].in_channels = 384
_base_.model.neck[1].in_channels = [384] * 4
