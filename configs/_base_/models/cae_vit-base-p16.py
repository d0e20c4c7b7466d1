"""CAE, ViT-B/16 at 224 px, DALL-E tokens (paper, "Training Details")."""

model = dict(
    type='cae_mm.CAE',
    data_preprocessor=dict(type='cae_mm.CAEDataPreprocessor'),
    backbone=dict(
        type='cae_mm.CAEViT', arch='base', img_size=224, patch_size=16, drop_path_rate=0.1
    ),
    neck=dict(
        type='cae_mm.CAENeck',
        in_dims=768,
        embed_dims=768,
        num_heads=12,
        regressor_depth=4,
        decoder_depth=4,
        out_dims=8192,
        drop_path_rate=0.1,
        layer_scale=0.1,
    ),
    head=dict(type='cae_mm.CAEPretrainHead', align_weight=2.0),
    target_generator=dict(
        type='cae_mm.DALLEEncoder',
        init_cfg=dict(type='Pretrained', checkpoint='cae_ckpt/dalle_encoder.safetensors'),
    ),
)
