"""As the base file for few GPUs: GroupNorm where 16 GPUs share one BatchNorm.

Over the images of one or two GPUs batch statistics would be others than over 32, and gathering
gradients does not help there. GroupNorm knows no batch.
"""

_base_ = './cae_vit-base_mask-rcnn_16xb2-amp-1x_coco.py'

norm_cfg = dict(type='GN', num_groups=32)
_base_.model.neck[0].norm_cfg = norm_cfg
_base_.model.roi_head.bbox_head.norm_cfg = norm_cfg
