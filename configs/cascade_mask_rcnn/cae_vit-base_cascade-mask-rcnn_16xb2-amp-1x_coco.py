"""Cascade Mask R-CNN on CAE-B, COCO, 12 epochs (paper, table 6)."""

_base_ = [
    '../_base_/models/cascade-mask-rcnn_cae_vit-base.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_16xb2_1x.py',
    '../_base_/runtime_mmdet.py',
]
