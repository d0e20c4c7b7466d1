"""Linear probe: BatchNorm and a linear layer on the class token, LARS at batch 16384 (paper)."""

_base_ = [
    '../models/vit-base-p16_cae-pre.py',
    '../schedules/coslr_90e.py',
    '../runtime.py',
]

model = dict(
    backbone=dict(out_type='cls_token', frozen_stages=12),
    head=dict(type='cae_mm.LinearProbeHead', num_classes=1000, in_channels=768),
)
optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    optimizer=dict(type='cae_mm.LARS', lr=6.4, weight_decay=0.0, momentum=0.9),  # 0.1 per 256
)
default_hooks = dict(checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=1))
settings = dict(cpu_batch_size=64)  # not fewer: BatchNorm's statistics
auto_scale_lr = dict(enable=True, base_batch_size=32 * 512)
