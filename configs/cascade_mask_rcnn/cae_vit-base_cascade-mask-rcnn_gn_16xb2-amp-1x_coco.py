"""As the base file for few GPUs, GroupNorm for SyncBN: see Mask R-CNN's file of this name."""

_base_ = './cae_vit-base_cascade-mask-rcnn_16xb2-amp-1x_coco.py'

norm_cfg = dict(type='GN', num_groups=32)
_base_.model.neck[0].norm_cfg = norm_cfg
for head in _base_.model.roi_head.bbox_head:
    head.norm_cfg = norm_cfg
