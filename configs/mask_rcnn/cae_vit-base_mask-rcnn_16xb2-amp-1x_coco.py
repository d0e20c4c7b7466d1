"""Mask R-CNN on CAE-B, COCO, 12 epochs.

    torchrun --nproc-per-node 8 --nnodes 2 ... tools/train.py THIS_FILE --launcher pytorch

Official: box AP 48.3, 49.9, 50.3 and mask AP 42.7, 43.9, 44.2 after 300, 800, 1600 epochs of
pretraining; the weights are named in ``model.backbone.init_cfg.checkpoint``.
"""

_base_ = [
    '../_base_/models/mask-rcnn_cae_vit-base.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_16xb2_1x.py',
    '../_base_/runtime_mmdet.py',
]
