"""DINO on CAE-L, COCO boxes, 12 epochs.

This recipe is ours, of mmdetection's DINO (batch 16, lr 1e-4, weight decay 1e-4, clipping at 0.1,
step at 11) and ViTDet's backbone (drop path 0.4, layer decay 0.8). The paper says only that its
detector with 64.6 AP (test-dev) is CAE-H, pretrained on ImageNet-22K, with DINO and Group DETR.
"""

_base_ = [
    '../_base_/models/dino-4scale_cae_vit-large.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_16xb2_1x.py',
    '../_base_/runtime_mmdet.py',
]

from cae_mm.engine.settings import apply_settings

train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
# as mmdetection: no limit to the long side before the crop
_base_.smaller.scales = [(side, 4200) for side in (400, 500, 600)]
choice = [[_base_.resize], [_base_.smaller, _base_.crop, _base_.resize]]
apply_settings(
    _base_,
    transforms=dict(LoadAnnotations=dict(with_mask=False), RandomChoice=dict(transforms=choice)),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(layer_decay_rate=0.8),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[11], gamma=0.1)]
auto_scale_lr = dict(base_batch_size=8 * 2)
