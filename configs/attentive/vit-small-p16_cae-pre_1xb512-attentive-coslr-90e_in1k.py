"""One GPU: batch 512, learning rate in proportion."""

_base_ = './vit-small-p16_cae-pre_32xb256-attentive-coslr-90e_in1k.py'

train_dataloader = dict(batch_size=512)
optim_wrapper = dict(optimizer=dict(lr=0.4 / 16))
auto_scale_lr = dict(enable=True, base_batch_size=512)
