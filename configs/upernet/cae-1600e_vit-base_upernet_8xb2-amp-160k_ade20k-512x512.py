"""As the base file, weights of 1600 epochs and the official learning rate for them: 50.3 mIoU."""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

checkpoint = 'work_dirs/cae_vit-base-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth'
model = dict(backbone=dict(init_cfg=dict(checkpoint=checkpoint)))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
