"""As the base file, weights of 800 epochs and the official learning rate for them: 49.7 mIoU."""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

checkpoint = 'work_dirs/cae_vit-base-p16_32xb64-amp-coslr-800e_in1k/epoch_800.pth'
model = dict(backbone=dict(init_cfg=dict(checkpoint=checkpoint)))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
