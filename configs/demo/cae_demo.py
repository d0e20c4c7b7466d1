"""CAE for `make demo`: a small ViT on grayscale crops of 64 px, 8 x 8 patches, own tokens."""

_base_ = [
    '../_base_/models/cae_vit-base-p16.py',
    '../_base_/datasets/in1k_two-view_224.py',
    '../_base_/schedules/cae_adamw_32xb64_300e.py',
    '../_base_/runtime.py',
]

batch_size, lr = 64, 1e-3
model = dict(
    data_preprocessor=dict(second_mean=[127.5] * 3, second_std=[127.5] * 3),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),
        img_size=64,
        patch_size=8,
        drop_path_rate=0.0,
    ),
    neck=dict(
        in_dims=192,
        embed_dims=192,
        num_heads=3,
        regressor_depth=2,
        decoder_depth=2,
        out_dims=256,
        drop_path_rate=0.0,
    ),
    target_generator=dict(
        _delete_=True,
        type='cae_mm.DiscreteVAE',
        vocab_size=256,
        codebook_dims=64,
        hidden_dims=64,
        num_res_blocks=1,
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/demo/dvae/epoch_12.pth'),
    ),
)
_base_.train_pipeline[2].update(size=64, second_size=64, scale=(0.3, 1.0))
_base_.train_pipeline[3].update(patch_size=8, min_block=6)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(data_root='work_dirs/demo/crops/', pipeline=_base_.train_pipeline),
)
optim_wrapper = dict(optimizer=dict(lr=lr))
_base_.param_scheduler[0].update(start_factor=0.01, end=2)
_base_.param_scheduler[1].begin = 2
train_cfg = dict(max_epochs=18)
auto_scale_lr = dict(enable=True, base_batch_size=batch_size)
