"""Eight GPUs: batch 2048, learning rate in proportion."""

_base_ = './vit-large-p16_cae-pre_32xb256-attentive-coslr-90e_in1k.py'

optim_wrapper = dict(optimizer=dict(lr=0.4 / 4))
auto_scale_lr = dict(enable=True, base_batch_size=8 * 256)
