"""Cascade Mask R-CNN: three stages with Mask R-CNN's head (official cascade_mask_rcnn_vit_fpn).

The official code has this base, but no config that uses it; its heads there are plain ones.
"""

_base_ = './mask-rcnn_cae_vit-base.py'

model = dict(
    type='CascadeRCNN',
    rpn_head=dict(
        loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0 / 9.0, loss_weight=1.0)
    ),
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            {
                **_base_.model.roi_head.bbox_head,
                'bbox_coder': dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0] * 4,
                    target_stds=[xy, xy, wh, wh],
                ),
            }
            for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
        ],
    ),
    train_cfg=dict(
        rpn=dict(allowed_border=0),
        rcnn=[
            {
                **_base_.model.train_cfg.rcnn,
                'assigner': dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
            }
            for iou in (0.5, 0.6, 0.7)
        ],
    ),
)
