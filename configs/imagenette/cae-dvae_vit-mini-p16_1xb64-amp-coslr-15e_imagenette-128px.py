"""CAE for the comparison on Imagenette: 6 blocks of width 192, 128 px, 32 of 64 patches masked."""

_base_ = '../pretrain/cae-dvae_vit-base-p16_1xb128-accum4-amp-coslr-300e_custom.py'

batch_size, lr = 64, 1e-3
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),
        img_size=128,
        drop_path_rate=0.0,
    ),
    neck=dict(
        in_dims=192,
        embed_dims=192,
        num_heads=3,
        regressor_depth=2,
        decoder_depth=2,
        out_dims=512,
        drop_path_rate=0.0,
    ),
    target_generator=dict(
        vocab_size=512,
        codebook_dims=64,
        hidden_dims=64,
        num_res_blocks=1,
        init_cfg=dict(
            checkpoint='work_dirs/dvae_1xb64-amp-coslr-6e_imagenette-64px/epoch_6.pth',
        ),
    ),
)
_base_.train_dataloader.dataset.pipeline[2].update(size=128, second_size=64, scale=(0.3, 1.0))
_base_.train_dataloader.dataset.pipeline[3].min_block = 6
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=2,
    dataset=dict(data_root='data/imagenette128/', data_prefix='train'),
)
optim_wrapper = dict(optimizer=dict(lr=lr), accumulative_counts=1)
_base_.param_scheduler[0].update(start_factor=0.01, end=2)
_base_.param_scheduler[1].begin = 2
train_cfg = dict(max_epochs=15)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
auto_scale_lr = dict(enable=True, base_batch_size=batch_size)
