"""CAE-B on your own images, tokens of a d-VAE that was trained on them before.

    python tools/train.py configs/tokenizer/dvae_1xb128-amp-coslr-100e_custom.py \
        --cfg-options settings.data_root=MY_IMAGES
    python tools/train.py THIS_FILE --cfg-options settings.data_root=MY_IMAGES

The folder may be flat or have sub-folders; for a list of files, one path a line, set
``train_dataloader.dataset.ann_file``.
"""

_base_ = './cae-dvae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

from cae_mm.engine.settings import apply_settings

batch = 4 * 128
lr = 1.5e-3 * batch / 2048

model = dict(
    target_generator=dict(
        init_cfg=dict(checkpoint='work_dirs/dvae_1xb128-amp-coslr-100e_custom/epoch_100.pth')
    )
)
apply_settings(_base_, batch_size=128)
train_dataloader = dict(
    drop_last=False,  # a small folder may hold less than a batch
    dataset=dict(data_root='data/custom/', data_prefix=''),
)
optim_wrapper = dict(optimizer=dict(lr=lr))
_base_.param_scheduler[0].start_factor = 1e-6 / lr
auto_scale_lr = dict(base_batch_size=batch)
