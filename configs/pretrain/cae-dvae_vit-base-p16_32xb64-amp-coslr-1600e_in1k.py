"""As the base file, 1600 epochs with 40 of warm-up (paper)."""

_base_ = './cae-dvae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

_base_.param_scheduler[0].end = _base_.param_scheduler[1].begin = 40
train_cfg = dict(max_epochs=1600)
