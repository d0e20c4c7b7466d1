"""The same probe of mmpretrain's MAE."""

_base_ = './vit-mini-p16_cae-pre_1xb64-attentive-coslr-6e_imagenette-128px.py'

model = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(
            _delete_=True, embed_dims=192, num_layers=6, num_heads=3, feedforward_channels=768
        ),
        norm_cfg=dict(type='LN', eps=1e-6),
        init_cfg=dict(
            checkpoint='work_dirs/mae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/'
            'epoch_15.pth'
        ),
    )
)
