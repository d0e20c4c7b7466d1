"""The same fine-tuning of mmpretrain's MAE; it has no relative position bias."""

_base_ = './vit-mini-p16_cae-pre_1xb64-coslr-3e_imagenette-128px.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=192, num_layers=6, num_heads=3, feedforward_channels=768),
        img_size=128,
        patch_size=16,
        out_type='avg_featmap',
        final_norm=False,  # a new norm follows the mean
        norm_cfg=dict(type='LN', eps=1e-6),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px/'
            'epoch_15.pth',
            prefix='backbone.',
        ),
    )
)
