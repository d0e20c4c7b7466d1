"""As the base file on one GPU: batch 16 = 4 images x 4 accumulations, 160,000 updates.

Batch statistics are those of 4 images; with 8 GPUs they are those of all 16.
"""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

# ---- what to change: memory of the GPU, effective batch and length
batch_size, accumulation = 4, 4
updates, warmup, val_interval = 160_000, 1_500, 16_000

model = dict(
    neck=dict(norm_cfg=dict(type='BN')),
    decode_head=dict(norm_cfg=dict(type='BN')),
    auxiliary_head=dict(norm_cfg=dict(type='BN')),
)
train_dataloader = dict(batch_size=batch_size)
# mmengine counts iterations, not updates
optim_wrapper = dict(accumulative_counts=accumulation)
_base_.param_scheduler[0].end = warmup * accumulation + 1
_base_.param_scheduler[1].end = updates * accumulation + 1
train_cfg = dict(max_iters=updates * accumulation, val_interval=val_interval * accumulation)
default_hooks = dict(checkpoint=dict(interval=val_interval * accumulation))
auto_scale_lr = dict(
    enable=True, base_batch_size=batch_size
)  # mmengine does not count accumulation
