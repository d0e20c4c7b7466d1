"""CAE for studies on two cores: 4 blocks of width 128, 64 px, 32 of 64 patches masked."""

_base_ = './cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px.py'

from cae_mm.engine.settings import apply_settings

_base_.model.backbone.update(
    arch=dict(embed_dims=128, depth=4, num_heads=2, layer_scale=0.1), patch_size=8
)
_base_.model.neck.update(in_dims=128, embed_dims=128, num_heads=2)
apply_settings(
    _base_,
    img_size=64,
    epochs=20,
    transforms=dict(CAEMaskGenerator=dict(patch_size=8)),
)
train_dataloader = dict(num_workers=1)
default_hooks = dict(checkpoint=dict(interval=2))
