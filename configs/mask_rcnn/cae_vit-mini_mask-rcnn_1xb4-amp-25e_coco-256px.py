"""Mask R-CNN small enough for a CPU: 6 blocks of width 192 at 256 px, heads of width 64.

For trying out data and code, not for results. Its encoder is that of
configs/imagenette/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px.py; without it, set
``model.backbone.init_cfg=None``.
"""

_base_ = './cae_vit-base_mask-rcnn_1xb2-accum16-amp-1x_coco.py'

batch_size, width = 4, 64
# the recipe has no norms in FPN and mask head; at a learning rate for few steps the maps blow up
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),
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

resize = dict(type='Resize', scale=(384, 256), keep_ratio=True)
_base_.train_dataloader.dataset.pipeline[3] = resize
_base_.val_dataloader.dataset.pipeline[1] = resize
_base_.test_dataloader.dataset.pipeline[1] = resize
train_dataloader = dict(batch_size=batch_size, num_workers=1)
optim_wrapper = dict(optimizer=dict(lr=5e-4), accumulative_counts=1)
_base_.param_scheduler[0].end = 50
_base_.param_scheduler[1].milestones = [20]
train_cfg = dict(max_epochs=25, val_interval=5)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=5))
auto_scale_lr = dict(enable=True, base_batch_size=batch_size)
