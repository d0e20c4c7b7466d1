"""Eight GPUs: batch 4096 by accumulation, so nothing else changes."""

_base_ = './vit-large-p16_cae-pre_32xb128-coslr-50e_in1k.py'

optim_wrapper = dict(accumulative_counts=4)
auto_scale_lr = dict(enable=True, base_batch_size=8 * 128)  # mmengine does not count accumulation
