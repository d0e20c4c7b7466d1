"""CAE-B on an own folder of images on one GPU, tokens of a d-VAE trained on the same folder.

    python tools/train.py configs/tokenizer/dvae_1xb128-amp-coslr-100e_custom.py \
        --cfg-options train_dataloader.dataset.data_root=MY_IMAGES
    python tools/train.py THIS_FILE --cfg-options train_dataloader.dataset.data_root=MY_IMAGES

The folder may be flat or have sub-folders; for a list of files, one path a line, set
``train_dataloader.dataset.ann_file``.
"""

_base_ = './cae-dvae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

# ---- what to change: memory of the GPU and effective batch
batch_size, accumulation = 128, 4
lr = 1.5e-3 * batch_size * accumulation / 2048

model = dict(
    target_generator=dict(
        init_cfg=dict(checkpoint='work_dirs/dvae_1xb128-amp-coslr-100e_custom/epoch_100.pth')
    )
)
_base_.train_dataloader.dataset.pipeline[0].on_error = 'skip'
train_dataloader = dict(
    batch_size=batch_size,
    drop_last=False,  # a small folder may hold less than a batch
    dataset=dict(data_root='data/custom/', data_prefix=''),
)
optim_wrapper = dict(optimizer=dict(lr=lr), accumulative_counts=accumulation)
_base_.param_scheduler[0].start_factor = 1e-6 / lr
auto_scale_lr = dict(
    enable=True, base_batch_size=batch_size
)  # mmengine does not count accumulation
