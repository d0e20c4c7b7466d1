"""One GPU: batch 1024, learning rate in proportion."""

_base_ = './vit-base-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py'

train_dataloader = dict(batch_size=1024)
optim_wrapper = dict(optimizer=dict(lr=6.4 / 16))
auto_scale_lr = dict(enable=True, base_batch_size=1024)
