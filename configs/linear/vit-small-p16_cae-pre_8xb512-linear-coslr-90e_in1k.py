"""Eight GPUs: batch 4096, learning rate in proportion."""

_base_ = './vit-small-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py'

optim_wrapper = dict(optimizer=dict(lr=6.4 / 4))
auto_scale_lr = dict(enable=True, base_batch_size=8 * 512)
