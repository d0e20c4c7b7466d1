"""CAE-B on your own images, second round: tokens are clusters of a first encoder's features.

The first round is any other config here; ``docs/pretraining.md`` has the three commands.
"""

_base_ = './cae-rgb_vit-base-p16_4xb128-amp-coslr-300e_custom.py'

model = dict(
    neck=dict(out_dims=8192),
    target_generator=dict(
        _delete_=True,
        type='cae_mm.KMeansTokenizer',
        backbone=dict(type='cae_mm.CAEViT', arch='base', patch_size=16),
        vocab_size=8192,
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/kmeans/tokenizer.safetensors'),
    ),
)
