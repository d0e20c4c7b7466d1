"""Fine-tuning of CAE-L: 50 epochs, layer decay 0.75, drop path 0.2 (paper, official).

Paper: 86.2 after 1600 epochs of pretraining.
"""

_base_ = './vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='work_dirs/cae_vit-large-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth'
        ),
    ),
    head=dict(in_channels=1024),
)
lr = 2e-3
optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=0.75))
_base_.param_scheduler[0].start_factor = _base_.param_scheduler[1].eta_min_ratio = 1e-6 / lr
train_cfg = dict(max_epochs=50)
