"""Fine-tuning of CAE-S: 200 epochs, layer decay 0.75 (paper)."""

_base_ = './vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(
            checkpoint='work_dirs/cae_vit-small-p16_32xb64-amp-coslr-300e_in1k/epoch_300.pth'
        ),
    ),
    head=dict(in_channels=384),
)
lr = 1.6e-2
optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=0.75))
_base_.param_scheduler[0].start_factor = _base_.param_scheduler[1].eta_min_ratio = 1e-6 / lr
train_cfg = dict(max_epochs=200)
