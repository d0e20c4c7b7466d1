"""CAE v2 (arXiv 2211.09799), ViT-B/16: CLIP's features of visible and masked patches, by cosine.

Numbers are those of the official code (project/CAEv2/scripts/caev2_base_300e.sh). CLIP ViT-B/16
lies in a folder of transformers' (``config.json``, ``model.safetensors``).
"""

_base_ = './cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

from cae_mm.engine.settings import apply_settings

model = dict(
    visible_targets=True,
    data_preprocessor=dict(second_mean=[0.0] * 3, second_std=[255.0] * 3),
    neck=dict(decoder_depth=0, out_dims=512),
    head=dict(align_weight=0.0, cosine=True),
    target_generator=dict(
        _delete_=True,
        type='cae_mm.CLIPFeatures',
        folder='cae_ckpt/clip-vit-base-patch16',
        patch_size=16,
    ),
)
apply_settings(
    _base_,
    transforms=dict(
        TwoViewResizedCrop=dict(second_size=224, second_interpolation='bicubic', scale=(0.4, 1.0))
    ),
)
jitter = dict(
    type='mmpretrain.ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, backend='cv2'
)
train_pipeline = [_base_.train_pipeline[0], jitter, *_base_.train_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
