"""Mask R-CNN small enough for a CPU: 6 blocks of width 192 at 256 px, heads of width 64.

For trying out data and code, not for results. Its encoder is that of
configs/imagenette/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px.py; without it, set
``model.backbone.init_cfg=None``.
"""

_base_ = './cae_vit-base_mask-rcnn_gn_16xb2-amp-1x_coco.py'

from cae_mm.engine.settings import apply_settings

width = 64
# the recipe has no norms in FPN and mask head; at a learning rate for few steps the maps blow up
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    backbone=dict(
        arch='mini',
        img_size=128,
        drop_path_rate=0.0,
        out_indices=(1, 2, 3, 5),
        init_cfg=dict(
            checkpoint='work_dirs/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/'
            'epoch_15.pth'
        ),
    ),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=width, conv_out_channels=width, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=width, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(in_channels=width, conv_out_channels=width, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
_base_.model.neck[0].in_channels = 192
_base_.model.neck[1].update(in_channels=[192] * 4, out_channels=width, norm_cfg=norm_cfg)

scale = (384, 256)
resize = dict(type='Resize', scale=scale, keep_ratio=True)
apply_settings(
    _base_,
    batch_size=4,
    transforms=dict(Resize=dict(scale=scale), RandomChoice=dict(transforms=[[resize]])),
)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
_base_.param_scheduler[0].end = 50
_base_.param_scheduler[1].milestones = [20]
train_cfg = dict(max_epochs=25, val_interval=5)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=5))
auto_scale_lr = dict(base_batch_size=4)
