"""Linear probe of CAE-B: BatchNorm and a linear layer on the class token, LARS (paper).

    torchrun --nproc-per-node 8 ... tools/train.py THIS_FILE --launcher pytorch \
        --cfg-options model.backbone.init_cfg.checkpoint=CHECKPOINT

Paper: 64.5 after 300 epochs of pretraining, 68.9 after 800, 70.3 after 1600.
"""

_base_ = [
    '../_base_/models/vit-base-p16_cae-pre.py',
    '../_base_/datasets/in1k_224.py',
    '../_base_/schedules/coslr_90e.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(out_type='cls_token', frozen_stages=12),
    head=dict(type='cae_mm.LinearProbeHead', num_classes=1000, in_channels=768),
)
train_dataloader = dict(batch_size=512)
optim_wrapper = dict(
    type='cae_mm.MixedPrecisionOptimWrapper',
    optimizer=dict(type='cae_mm.LARS', lr=6.4, weight_decay=0.0, momentum=0.9),  # 0.1 per 256
)
default_hooks = dict(checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=1))
# each process has BatchNorm statistics of its own: evaluation needs one set
custom_hooks = [*_base_.custom_hooks, dict(type='SyncBuffersHook')]
auto_scale_lr = dict(enable=True, base_batch_size=32 * 512)
