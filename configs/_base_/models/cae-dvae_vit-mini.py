"""CAE small enough for a CPU: 6 blocks of width 192, tokens of a d-VAE of 512."""

_base_ = './cae_vit-base-p16.py'

model = dict(
    data_preprocessor=dict(second_mean=[127.5] * 3, second_std=[127.5] * 3),
    backbone=dict(arch='mini', drop_path_rate=0.0),
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
        _delete_=True,
        type='cae_mm.DiscreteVAE',
        vocab_size=512,
        codebook_dims=64,
        hidden_dims=64,
        num_res_blocks=1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/dvae_1xb64-amp-coslr-6e_imagenette-64px/epoch_6.pth',
        ),
    ),
)
