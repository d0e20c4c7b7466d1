"""Fine-tuning for the comparison on Imagenette."""

_base_ = ['../_base_/protocols/finetune.py', '../_base_/datasets/imagenette_128.py']

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch='mini',
        img_size=128,
        drop_path_rate=0.0,
        init_cfg=dict(
            checkpoint='work_dirs/cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/'
            'epoch_15.pth'
        ),
    ),
    head=dict(num_classes=10, in_channels=192),
)
_, erasing = _base_.randaugment_and_erasing
jitter = dict(  # in place of RandAugment, for which three epochs are few
    type='mmpretrain.ColorJitter',
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    backend='cv2',  # mmcv's other backend warns each time
)
_base_.train_pipeline[-1:-1] = [jitter, erasing]
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
lr = 1e-3
optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=0.75))
_base_.param_scheduler[0].update(start_factor=0.01, end=1)
_base_.param_scheduler[1].update(eta_min_ratio=0.01, begin=1)
train_cfg = dict(max_epochs=3, val_interval=3)
settings = dict(cpu_batch_size=None)
auto_scale_lr = dict(base_batch_size=64)
