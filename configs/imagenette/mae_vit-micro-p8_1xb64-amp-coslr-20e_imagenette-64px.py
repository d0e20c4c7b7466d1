"""mmpretrain's MAE with the encoder, data, epochs and optimizer of the CAE beside it."""

_base_ = './mae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px.py'

from cae_mm.engine.settings import apply_settings

_base_.model.backbone.update(
    arch=dict(embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512), patch_size=8
)
_base_.model.neck.update(
    patch_size=8, embed_dim=128, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2
)
_base_.model.head.patch_size = 8
apply_settings(_base_, img_size=64, epochs=20)
train_dataloader = dict(num_workers=1)
default_hooks = dict(checkpoint=dict(interval=2))
