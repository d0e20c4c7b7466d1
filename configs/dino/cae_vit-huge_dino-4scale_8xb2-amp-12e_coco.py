"""DINO on CAE-H, the size of the paper's 64.6 AP: see CAE-L's file for what this recipe is.

There is no pretraining recipe for CAE-H in the paper: weights come from elsewhere.
"""

_base_ = './cae_vit-large_dino-4scale_8xb2-amp-12e_coco.py'

model = dict(
    backbone=dict(
        arch='huge',
        drop_path_rate=0.5,
        global_blocks=(7, 15, 23, 31),
        init_cfg=dict(checkpoint='cae_ckpt/cae_vit-huge-p16.pth'),
    )
)
_base_.model.neck[0].in_channels = 1280
_base_.model.neck[1].in_channels = [1280] * 3
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
