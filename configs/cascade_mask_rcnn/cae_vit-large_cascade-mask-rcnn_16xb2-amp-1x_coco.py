"""Cascade Mask R-CNN on CAE-L, with the numbers of Mask R-CNN's."""

_base_ = './cae_vit-base_cascade-mask-rcnn_16xb2-amp-1x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        out_indices=(7, 11, 15, 23),
        init_cfg=dict(
            checkpoint='work_dirs/cae_vit-large-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth'
        ),
    )
)
_base_.model.neck[0].in_channels = 1024
_base_.model.neck[1].in_channels = [1024] * 4
# paper: decay 0.8; official config: 0.85
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay_rate=0.8))
