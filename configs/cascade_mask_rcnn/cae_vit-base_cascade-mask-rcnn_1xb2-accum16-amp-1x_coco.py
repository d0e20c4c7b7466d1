"""As the base file on one GPU, GroupNorm for SyncBN: see Mask R-CNN's file of this name."""

_base_ = './cae_vit-base_cascade-mask-rcnn_16xb2-amp-1x_coco.py'

# ---- what to change: memory of the GPU and effective batch
batch_size, accumulation = 2, 16
lr = 3e-4 * batch_size * accumulation / 32

norm_cfg = dict(type='GN', num_groups=32)
_base_.model.neck[0].norm_cfg = norm_cfg
for head in _base_.model.roi_head.bbox_head:
    head.norm_cfg = norm_cfg
train_dataloader = dict(batch_size=batch_size)
optim_wrapper = dict(optimizer=dict(lr=lr), accumulative_counts=accumulation)
_base_.param_scheduler[0].end = 500 * accumulation  # 500 updates
auto_scale_lr = dict(
    enable=True, base_batch_size=batch_size
)  # mmengine does not count accumulation
