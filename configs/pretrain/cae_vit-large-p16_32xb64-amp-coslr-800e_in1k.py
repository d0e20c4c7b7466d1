"""As the base file, 800 epochs with 20 of warm-up (paper)."""

_base_ = './cae_vit-large-p16_32xb64-amp-coslr-300e_in1k.py'

_base_.param_scheduler[0].end = _base_.param_scheduler[1].begin = 20
train_cfg = dict(max_epochs=800)
